"""Tiny random models with a character tokenizer, as ordinary model folders, and rollouts written by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config

from opsd.types import Prompt, Rollout

CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz +-=?.;"
PAD, EOS, UNKNOWN, USER, ASSISTANT, THINK = "<pad>", "<eos>", "<unk>", "<user>", "<assistant>", "<think>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking %}<think>{% endif %}{% endif %}"
)

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
MakeModel = Callable[..., PreTrainedModel]
MakeFolder = Callable[..., Path]
MakeRollout = Callable[..., Rollout]


def build_tokenizer(characters: str = CHARACTERS, chat: bool = True, pad: str | None = PAD) -> PreTrainedTokenizerFast:
    """One token a character. Ids: the six special tokens first, then the characters in order."""
    special = [PAD, EOS, UNKNOWN, USER, ASSISTANT, THINK]
    vocab = {token: number for number, token in enumerate([*special, *characters])}
    tokenizer = _tokenizer(vocab, pad_token=pad, additional_special_tokens=[USER, ASSISTANT, THINK])
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(family: str = "qwen3", tied: bool = True, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A random two-layer model of 52 vocabulary rows (three more than the tokenizer has), fp32, sdpa."""
    config = {"qwen3": Qwen3Config, "llama": LlamaConfig}[family](
        **{
            "vocab_size": 52,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "max_position_embeddings": 256,
            "tie_word_embeddings": tied,
            # Wide enough that the next token is far from uniform and greedy choices are not ties.
            "initializer_range": 0.3,
            "eos_token_id": 1,
            "pad_token_id": 0,
            "bos_token_id": None,
            **settings,
        }
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    return model.eval()


def tiny_model(tied: bool, seed: int) -> PreTrainedModel:
    """The same by its head and its weights alone: what engines, ranks and teachers are compared on."""
    return build_model(tied=tied, seed=seed)


def vllm_model(seed: int) -> PreTrainedModel:
    """Of a shape that vLLM's CPU attention takes, and with heads that two ranks can share."""
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 32}
    return build_model(seed=seed, initializer_range=0.1, **sizes)


def plain_tokenizer() -> PreTrainedTokenizerFast:
    """49 tokens without a chat template: three special ones, then one a character."""
    vocabulary = ["<pad>", "<eos>", "<unk>", *"0123456789+=abcdefghijklmnopqrstuvwxyz-*/()., "][:49]
    return _tokenizer({token: place for place, token in enumerate(vocabulary)}, pad_token=PAD)


def _tokenizer(vocabulary: dict[str, int], **more: Any) -> PreTrainedTokenizerFast:
    """One token a character."""
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=EOS, unk_token=UNKNOWN, **more)


def tiny_pair(
    folder: Path, model: Callable[[int], PreTrainedModel] = lambda seed: tiny_model(True, seed), answers: bool = True
) -> dict[str, Any]:
    """Writes a pair of models and their sums into `folder`; the settings that name them, for a run of raw prompts."""
    data = folder / "sums.jsonl"
    sums = [(a, b) for a in range(4) for b in range(4)]
    tasks = [{"prompt": f"{a}+{b}=", **({"answer": str(a + b)} if answers else {})} for a, b in sums]
    data.write_text("".join(json.dumps(task) + "\n" for task in tasks))
    for name, seed in (("student", 0), ("teacher", 1)):
        model(seed).save_pretrained(folder / name)
        plain_tokenizer().save_pretrained(folder / name)
    return {
        "student": str(folder / "student"),
        "teacher": {"model": str(folder / "teacher")},
        "prompts": str(data),
        "prompt_format": "raw",
        "track": {"progress": False},
    }


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    """See build_tokenizer."""
    return build_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The character tokenizer with its chat template; not to be changed."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """See build_model."""
    return build_model


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory: pytest.TempPathFactory) -> MakeFolder:
    """Saves a model and a tokenizer as a model folder."""

    def make(model: PreTrainedModel | None = None, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
        folder = tmp_path_factory.mktemp("model")
        (model or build_model()).save_pretrained(folder)
        (tokenizer or build_tokenizer()).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def make_rollout() -> MakeRollout:
    """A rollout from ids alone."""

    def make(
        number: int,
        prompt_ids: list[int],
        response_ids: list[int],
        mask: list[bool] | None = None,
        *,
        truncated: bool = False,
        answer: str | None = None,
    ) -> Rollout:
        prompt = Prompt(str(number), "", prompt_ids, answer)
        return Rollout(number, prompt, response_ids, truncated, mask)

    return make
