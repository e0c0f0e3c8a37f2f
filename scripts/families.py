"""Tiny random models of the families that transformers builds from a configuration, as ordinary model folders.

Matrices, and a head's bias, have a standard deviation of 0.35: with 0.02, transformers' default, the effect of a soft
cap or of a leak between sequences would be too small to detect. The tokenizer has one token per character.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

STD = 0.35
CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz +-=?.;"
SPECIAL = ("<pad>", "<eos>", "<unk>", "<user>", "<assistant>")
TOKENIZER_IDS = len(SPECIAL) + len(CHARACTERS)
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# vLLM's CPU kernels take heads of 32 and more.
SIZES = {
    "vocab_size": 52,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
LAYERS = ["sliding_attention", "full_attention"]
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}


@dataclass(frozen=True)
class Family:
    """config: the class in transformers. settings: in addition to SIZES. without: SIZES that the family lacks."""

    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()

    def build(self, seed: int = 0, **changes: Any) -> PreTrainedModel:
        """A random model, fp32. changes: to the configuration."""
        sizes = {name: value for name, value in SIZES.items() if name not in self.without}
        kind: Callable[..., Any] = getattr(transformers, self.config)
        config = kind(**{**sizes, **self.settings, **changes})
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
            bias = getattr(model.get_output_embeddings(), "bias", None)
            for parameter in model.parameters():
                if parameter.dim() >= 2 or parameter is bias:
                    torch.nn.init.normal_(parameter, std=STD)
        return model.eval()


FAMILIES = {
    "Qwen2": Family("Qwen2Config"),
    "Qwen2.5": Family("Qwen2Config", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "Qwen3": Family("Qwen3Config"),
    "Qwen3-MoE": Family("Qwen3MoeConfig", {"num_experts": 4, **EXPERTS}),
    "Llama 3": Family("LlamaConfig"),
    "Llama 4 (text)": Family(
        "Llama4TextConfig", {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 128}
    ),
    "Gemma 2": Family("Gemma2Config", {"query_pre_attn_scalar": 32, "sliding_window": 16}),
    "Gemma 3 (text)": Family("Gemma3TextConfig", {"query_pre_attn_scalar": 32, "sliding_window": 16}),
    "Gemma 3n (text)": Family(
        "Gemma3nTextConfig",
        {"sliding_window": 16, "layer_types": LAYERS, "laurel_rank": 8, "vocab_size_per_layer_input": 52,
         "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0]},
    ),
    "Gemma 4 (text)": Family(
        "Gemma4TextConfig",
        {"sliding_window": 16, "layer_types": LAYERS, "global_head_dim": 32, "vocab_size_per_layer_input": 52,
         "hidden_size_per_layer_input": 16, "final_logit_softcapping": 30.0},
    ),
    "Mistral": Family("MistralConfig", {"sliding_window": 16}),
    "Mixtral": Family("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Phi": Family("PhiConfig", without=("head_dim",)),
    "Phi-MoE": Family("PhimoeConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "lm_head_bias": True}),
    "Phi-3": Family("Phi3Config", {"original_max_position_embeddings": 256}),
    "Cohere 2": Family("Cohere2Config", {"sliding_window": 16}),
    "Granite": Family("GraniteConfig", {"logits_scaling": 8.0}),
    "MiniCPM 3": Family(
        "MiniCPM3Config",
        {"num_key_value_heads": 2, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "q_lora_rank": 16,
         "kv_lora_rank": 16, "v_head_dim": 32},
    ),
    "OLMo 2": Family("Olmo2Config"),
    "SmolLM 3": Family("SmolLM3Config"),
    "Falcon-H1": Family(
        "FalconH1Config",
        {"mamba_d_ssm": 64, "mamba_n_heads": 2, "mamba_d_head": 32, "mamba_d_state": 16, "lm_head_multiplier": 0.5},
    ),
    "GPT-2": Family(
        "GPT2Config",
        {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256},
        ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "head_dim", "max_position_embeddings"),
    ),
}  # fmt: skip


@torch.no_grad()
def own_kl(run: Path, student: Path, teacher: Path) -> float:
    """Mean KL(student‖teacher) in nats over the tokens that a run's first step wrote, computed by transformers alone.

    From `model(ids).logits` of both models, each rollout by itself, in fp32; the run saved its rollouts.
    """
    pair = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
        for path in (student, teacher)
    ]
    found = []
    for line in (run / "rollouts" / "step_1.jsonl").read_text().splitlines():
        rollout = json.loads(line)
        ids = torch.tensor([rollout["prompt_ids"] + rollout["response_ids"]])[:, :-1]
        first = len(rollout["prompt_ids"]) - 1
        log_s, log_t = (
            model.eval()(ids, use_cache=False).logits[0, first:, :TOKENIZER_IDS].log_softmax(-1) for model in pair
        )
        found.append((log_s.exp() * (log_s - log_t)).sum(-1))
    return float(torch.cat(found).mean())


def tokenizer() -> PreTrainedTokenizerFast:
    """A token per character; special tokens have the first ids."""
    vocab = {token: number for number, token in enumerate([*SPECIAL, *CHARACTERS])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def write(folder: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """Write a model folder of a family; returns the folder."""
    FAMILIES[family].build(seed, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
