"""Attention over packed rollouts: they must not see each other; the cost of attention by lengths and by a mask.

Legend: L tokens of a row, S sequences of a row, H query heads, G key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, Qwen3Config

from bench.baselines import Unavailable
from bench.meter import measure, seconds_of
from gpu.check import Check, Row, relative
from opsd.model.attention import VARLEN, in_one_row

# Those of Qwen3-4B and -8B.
HEADS, KV_HEADS, HEAD = 32, 8, 128
SEQUENCES = 4
BF16 = torch.bfloat16
# Each kernel rounds to bf16 at different points, in every layer; a leak between sequences gives an error of order 1.
ERROR = 3e-2
NAMES = {"sdpa": "a mask", VARLEN: "lengths"}


def attention(check: Check) -> None:
    """Both kinds of attention in a model of two layers; then the attention of one layer alone."""
    for name, how in NAMES.items():
        check.tried("packed rollouts", lambda name=name: _packed(check, name), ERROR, told_apart_by=how)
    layer = _Layer(check)
    for name, how in NAMES.items():
        about = {"tokens": layer.tokens, "rollouts": SEQUENCES, "told_apart_by": how}
        check.tried("one layer", lambda name=name: layer.measured(name), ERROR, **about)


def _needs_cuda(check: Check, name: str) -> None:
    if name == VARLEN and not check.on_cuda:
        raise Unavailable("torch's kernel of variable length needs CUDA")


@torch.no_grad()
def _packed(check: Check, name: str) -> Row:
    """A rollout packed behind another: its states must not depend on what is packed in front of it."""
    _needs_cuda(check, name)
    model = _model(check, name)
    length = 32 if check.small else 512
    one, other, last = (torch.randint(1024, (1, length), device=check.device) for _ in range(3))
    positions = torch.arange(length, device=check.device).repeat(2)[None]

    def behind(first: Tensor) -> Tensor:
        row = {"input_ids": torch.cat([first, last], 1), "position_ids": positions}
        return in_one_row(model.base_model, [length, length], **row, use_cache=False).last_hidden_state[:, length:]

    alone = model.base_model(input_ids=last, use_cache=False).last_hidden_state
    apart = float((behind(one) - behind(other)).abs().max())
    return {"error": relative(behind(one), alone), "largest_change_by_the_one_in_front": apart}


def _model(check: Check, name: str) -> Any:
    hidden, ffn, heads, shared, head = (64, 128, 4, 2, 16) if check.small else (2560, 9728, HEADS, KV_HEADS, HEAD)
    config = Qwen3Config(
        vocab_size=1024,
        num_hidden_layers=2,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        head_dim=head,
    )
    with torch.device(check.device):
        model = AutoModelForCausalLM.from_config(config, dtype=BF16, attn_implementation="sdpa").eval()
    model.set_attn_implementation(name)
    return model


class _Layer:
    """Queries, keys and values of four rollouts in one row, as a layer of the model passes them to its attention."""

    def __init__(self, check: Check) -> None:
        self._check = check
        self.tokens = check.sizes.tokens
        self._length = self.tokens // SEQUENCES
        self._inputs = [self._drawn(heads).requires_grad_() for heads in (HEADS, KV_HEADS, KV_HEADS)]
        self._grad = self._drawn(HEADS).transpose(1, 2)
        self._module = SimpleNamespace(num_key_value_groups=HEADS // KV_HEADS, is_causal=True, training=True)

    def _drawn(self, heads: int) -> Tensor:
        return torch.randn(1, heads, self.tokens, HEAD, device=self._check.device, dtype=BF16)

    def _call(self, name: str) -> Callable[[], Tensor]:
        attend = AttentionInterface()[name]
        options: dict[str, Any] = {"attention_mask": None}
        if name == VARLEN:
            ends_S = torch.arange(0, self.tokens + 1, self._length, dtype=torch.int32, device=self._check.device)
            options |= {"cu_seq_lens_q": ends_S, "cu_seq_lens_k": ends_S}
            options |= {"max_length_q": self._length, "max_length_k": self._length}
        else:
            options["attention_mask"] = self._mask()
        return lambda: attend(self._module, *self._inputs, scaling=HEAD**-0.5, **options)[0]

    def _mask(self) -> Tensor:
        """Which token attends to which, bool [1, 1, L, L]."""
        owner_L = torch.arange(self.tokens, device=self._check.device) // self._length
        own_LL = owner_L[:, None] == owner_L[None]
        return own_LL.tril_()[None, None]

    def measured(self, name: str) -> Row:
        """Forward, forward and backward, peak memory, and the difference from the mask's results."""
        _needs_cuda(self._check, name)
        forward, device = self._call(name), self._check.device

        def both() -> Tensor:
            return torch.autograd.grad(forward(), self._inputs, self._grad)[0]

        with torch.no_grad():
            error = relative(forward(), self._call("sdpa")())
        found = measure(both, device)
        return {
            "forward_ms": 1e3 * seconds_of(lambda: forward().detach(), device),
            "both_ms": 1e3 * found.seconds,
            "peak_gib": found.peak_bytes / 2**30,
            "error": error,
            **self._check.kernels(both),
        }
