"""Attention of variable length: what it hands to torch's kernel, against rows of their own; and when it is chosen.

The kernel itself runs on CUDA alone. A stand-in computes the same sequence by sequence.
"""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from tolerance import close, transformer
from transformers import AutoModelForCausalLM, FalconConfig, LlamaConfig, OPTConfig, PhiConfig, Qwen3Config

from opsd.build.models import load_student
from opsd.config import EngineConfig, LoraConfig
from opsd.data.packing import pack
from opsd.model import attention, checks, loading
from opsd.model.attention import FLASH, VARLEN, attention_for, has_varlen_attention
from opsd.model.loading import disable_dropout, load_scorer
from opsd.model.scorer import Scorer
from opsd.rollout import HFRollout
from opsd.types import Prompt, Sampling
from opsd.utils.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
# Skewed on purpose: one long rollout beside many short ones.
LENGTHS = [(5, 7), (1, 1), (9, 3), (1, 12), (60, 40), (2, 2), (3, 9), (1, 5)]


def naive(query, key, value, ends, scale, window, causal):
    """Attention of each sequence by itself, in fp32, as sums over the allowed pairs."""
    found = []
    for start, end in pairwise(ends.tolist()):
        q, k, v = (states[start:end].float().transpose(0, 1) for states in (query, key, value))
        k, v = (states.repeat_interleave(len(q) // len(states), 0) for states in (k, v))
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        back = torch.arange(end - start)[:, None] - torch.arange(end - start)
        allowed = back <= (window if window >= 0 else end)
        if causal:
            allowed &= back >= 0
        found.append((scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(found).to(query.dtype)


@pytest.fixture
def kernel(monkeypatch):
    """Stands in for torch's kernel, with its newest signature; notes each call's types and lengths."""
    calls = []

    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
    ):
        lengths = cu_seq_q.diff()
        assert cu_seq_q.dtype == torch.int32 and cu_seq_k is cu_seq_q and max_q == max_k == int(lengths.max())
        assert enable_gqa == (query.shape[1] != key.shape[1]) and int(cu_seq_q[-1]) == len(query)
        calls.append(({query.dtype, key.dtype, value.dtype}, lengths.tolist()))
        return naive(query, key, value, cu_seq_q, scale, window_size[0], window_size[1] == 0)

    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)
    return calls


def with_varlen(model):
    model.set_attn_implementation(VARLEN)
    return model


def packed(make_rollout, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(0)

    def ids(count):
        return torch.randint(6, 49, (count,), generator=generator).tolist()

    (micro,) = pack([make_rollout(place, ids(a), ids(b)) for place, (a, b) in enumerate(lengths)], 1000)
    return micro


def hidden_and_gradients(model, micro):
    """Of a loss that weighs every hidden state differently."""
    hidden_ND = Scorer(model).hidden(micro)
    generator = torch.Generator().manual_seed(1)
    (hidden_ND * torch.randn(hidden_ND.shape, generator=generator)).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return hidden_ND.detach(), found


def same(found, expected):
    close(found[0], expected[0], *transformer(2, 16))
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        close(found[1][name], gradient, *transformer(2, 16, backward=1), said=name)


@pytest.mark.numeric
@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_hidden_states_and_gradients_are_those_of_rows_of_their_own(
    make_model, make_rollout, kernel, monkeypatch, family, checkpointing
):
    micro = packed(make_rollout)
    expected = hidden_and_gradients(make_model(family, **GROUPED), micro)
    model = with_varlen(make_model(family, **GROUPED))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    monkeypatch.setattr(attention, "sdpa_mask", lambda *_, **__: 1 / 0)  # no mask is formed
    same(hidden_and_gradients(model, micro), expected)
    # Every layer, and every layer again where it is computed anew for backward: never by another attention.
    assert kernel == [({torch.float32}, micro.lengths)] * (2 * (1 + checkpointing))


@pytest.mark.numeric
def test_a_window_reaches_as_far_back_as_under_sdpa(make_model, make_rollout, kernel):
    window = {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    micro = packed(make_rollout)
    expected = hidden_and_gradients(make_model(**GROUPED, **window), micro)
    same(hidden_and_gradients(with_varlen(make_model(**GROUPED, **window)), micro), expected)
    everything = hidden_and_gradients(make_model(**GROUPED), micro)
    assert float((everything[0] - expected[0]).abs().max()) > 0.01  # the window matters


@pytest.mark.numeric
def test_a_kernel_without_windows_scale_or_grouped_heads_serves_too(make_model, make_rollout, monkeypatch):
    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
        assert query.shape == key.shape
        return naive(query, key, value, cu_seq_q, None, -1, is_causal)

    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)
    micro = packed(make_rollout)
    models = [make_model(**GROUPED) for _ in range(2)]
    for model in models:
        for layer in model.model.layers:
            layer.self_attn.scaling = 0.2  # the kernel's own would be 1/√8
    same(hidden_and_gradients(with_varlen(models[1]), micro), hidden_and_gradients(models[0], micro))


def test_torchs_kernel_has_the_names_that_it_is_called_by():
    takes = attention._takes(attention.varlen_attn)
    first = ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert set(first) <= takes and ("window_size" in takes or "is_causal" in takes)


@pytest.mark.numeric
def test_without_lengths_it_is_sdpa_with_its_masks(make_model, kernel):
    ids = torch.randint(6, 49, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    expected, found = make_model(**GROUPED), with_varlen(make_model(**GROUPED))
    for more in ({}, {"attention_mask": mask}, {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2)}):
        assert torch.equal(found(ids, **more, use_cache=False).logits, expected(ids, **more, use_cache=False).logits)
    assert not kernel


def test_sampling_is_what_it_is_under_sdpa_and_training_goes_on_with_the_lengths(make_model, tokenizer, kernel):
    texts = ["1+1=", "what is 17-4?", "a"]
    prompts = [Prompt(text, text, tokenizer(text).input_ids, None) for text in texts]
    found = []
    for model in (make_model(**GROUPED), with_varlen(make_model(**GROUPED))):
        rollouts = HFRollout(model, tokenizer, 64).generate(prompts, 3, Sampling(max_new_tokens=9), seed=0)
        found.append([rollout.response_ids for rollout in rollouts])
    assert found[0] == found[1] and not kernel
    assert model.config._attn_implementation == VARLEN
    assert "attn" not in str(model.config.to_dict())  # a checkpoint names no attention of ours


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_what_the_kernel_cannot_do_is_one_line(kernel, name):
    states = torch.ones(1, 2, 3, 8)
    with pytest.raises(UserError, match=rf"^torch's variable-length attention kernel does not support {name}[^\n]+$"):
        attention._attend(
            None, states, states, states, None, cu_seq_lens_q=torch.tensor([0, 3]), max_length_q=3, **{name: states}
        )


# ---- the choice


@pytest.fixture
def machine(monkeypatch):
    """A GPU of a given generation, with or without flash-attn."""

    def set_to(capability=(9, 0), flash=False):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: flash)

    return set_to


def meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


SIZES = {"vocab_size": 52, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("compute", "device", "settings", "expected"),
    [
        (torch.bfloat16, CUDA, {}, VARLEN),
        (torch.bfloat16, CUDA, {"flash": True}, FLASH),
        (torch.bfloat16, CUDA, {"capability": (7, 5)}, "sdpa"),
        (torch.float32, CUDA, {"flash": True}, "sdpa"),
        (torch.bfloat16, CPU, {"flash": True}, "sdpa"),
    ],
)
def test_the_compute_type_the_gpu_and_what_is_installed_decide(machine, compute, device, settings, expected):
    machine(**settings)
    # The weights are fp32, as a student's always are when it is loaded.
    model = meta(LlamaConfig(**SIZES, intermediate_size=64))
    assert model.dtype == torch.float32
    assert attention_for(model, compute, device) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (Qwen3Config(**SIZES, head_dim=16), VARLEN),
        (PhiConfig(**SIZES), VARLEN),
        (Qwen3Config(**SIZES, head_dim=512), "sdpa"),  # more than the kernel's 256
        (LlamaConfig(**SIZES, head_dim=20), "sdpa"),  # not a multiple of 8
        (LlamaConfig(**SIZES, attention_chunk_size=8), "sdpa"),
        (FalconConfig(**SIZES), "sdpa"),  # passes nothing on to its attention
        (OPTConfig(**SIZES, word_embed_proj_dim=64), VARLEN),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.model_type} {getattr(value, 'head_dim', '')}",
)
def test_a_model_whose_attention_the_kernel_cannot_be_keeps_sdpa(machine, config, expected):
    machine()
    assert attention_for(meta(config), torch.bfloat16, CUDA) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_student_is_loaded_with_the_attention_of_the_compute_type_and_checked_under_its_autocast(
    make_model, make_folder, kernel, monkeypatch, dtype
):
    asked = []

    def chosen(model, compute, device):
        asked.append((model.dtype, compute, device))
        return VARLEN

    monkeypatch.setattr(loading, "attention_for", chosen)
    path = str(make_folder(make_model(**GROUPED)))
    config = SimpleNamespace(engine=EngineConfig(dtype=dtype), lora=LoraConfig(), trust_remote_code=False)
    scorer = load_student(config, path, CPU)
    assert asked == [(torch.float32, getattr(torch, dtype), CPU)]
    assert scorer.packed and has_varlen_attention(scorer.model) and scorer.head.weight.dtype == torch.float32
    # check_packing's two sequences: queries and keys that norms have widened are rounded as values are.
    assert kernel and all(call == ({getattr(torch, dtype)}, [16, 5]) for call in kernel)


def test_a_model_that_mixes_packed_sequences_under_a_mask_keeps_them_apart_by_lengths(kernel):
    config = OPTConfig(**SIZES, word_embed_proj_dim=64, ffn_dim=32, init_std=0.3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    disable_dropout(model)
    checks.check_packing(Scorer(with_varlen(model)), "M")
    assert kernel == [({torch.float32}, [16, 5])]


def test_a_kernel_that_mixes_sequences_is_given_none_that_lie_in_one_row(make_model, make_folder, monkeypatch):
    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
        return naive(query, key, value, cu_seq_q[[0, -1]], None, -1, is_causal)

    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)
    monkeypatch.setattr(loading, "attention_for", lambda *_: VARLEN)
    folder = str(make_folder(make_model()))
    for compute in (torch.float32, torch.bfloat16):
        assert load_scorer(folder, "--student", torch.float32, CPU, compute=compute).layout == "padded"
        with pytest.raises(UserError, match="sequences packed into one row see each other"):
            load_scorer(folder, "--student", torch.float32, CPU, packed=True, compute=compute)
