"""A KV cache and attention for decoding, without the copies that transformers' own make for every token.

Both use extension points of transformers: a cache layer, and an attention function with its mask function.
Everything but the plain case (windows, recurrent states, several queries, other kernels) is left to transformers.

Legend: B rows, L tokens in the cache, H heads, G of which share a key-value head, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from opsd.model.attention import FLASH, VARLEN, compute_dtype

NAME = "opsd_decode"
# Minimum number of free positions that a cache layer allocates when it grows.
BLOCK_TOKENS = 64


class GrowingLayer(DynamicLayer):
    """A cache layer with preallocated room for coming tokens: a new one is written in place, nothing else is copied.

    limit: maximum number of tokens. The room grows by half of the length, so that short answers do not pay for the
    longest. Keys and values are views of the used part: attention reads nothing else.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit
        self._room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values [B, H / G, L, D], including the new ones, in attention's compute dtype.

        Under autocast, keys arrive in fp32 from norms and rotations: stored so, they would take twice the memory, and
        attention would cast all of them for every token.
        """
        key_states, value_states = (states.to(compute_dtype(states)) for states in (key_states, value_states))
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self._room is None or self._room[0].shape[-2] < end:
            tokens = max(end, min(self._limit, end + max(BLOCK_TOKENS, end // 2)))
            self._room = self._grown(key_states, self.keys, tokens), self._grown(value_states, self.values, tokens)
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, start:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self._room)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep only these rows, in this order."""
        if self._room is not None:
            length = self.get_seq_length()
            self._room = self._room[0][beam_idx], self._room[1][beam_idx]
            self.keys, self.values = (room[:, :, :length] for room in self._room)

    @staticmethod
    def _grown(new: Tensor, old: Tensor | None, tokens: int) -> Tensor:
        """Room for `tokens` tokens, shaped like `new`, that begins with `old`."""
        room = new.new_empty(*new.shape[:2], tokens, new.shape[-1])
        if old is not None and old.numel():
            room[:, :, : old.shape[-2]] = old
        return room


def new_cache(config: PreTrainedConfig, limit: int) -> DynamicCache:
    """transformers' cache for a model, with a `GrowingLayer` in place of each plain layer. limit: maximum tokens."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer(limit) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@contextmanager
def decode_attention(model: PreTrainedModel) -> Iterator[None]:
    """Context in which a model with one of the trainer's attention kernels reads its cache by sdpa, without copies.

    Rows in a batch are padded on the left: variable-length attention would remove the padding, and restore it,
    in every layer for every token.
    """
    before = str(model.config._attn_implementation)
    switched = before in ("sdpa", FLASH, VARLEN) and model._can_set_attn_implementation()
    if switched:
        model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        if switched:
            model.set_attn_implementation(before)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **how: Any
) -> tuple[Tensor, None]:
    """sdpa; one query per row [B, H, 1, D] becomes G queries per key-value head, so keys and values are not copied."""
    (B, H, queries, _), shared = query.shape, key.shape[1]
    by_head = attention_mask is not None and attention_mask.shape[1] != 1
    if queries != 1 or shared == H or by_head or how.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **how)
    grouped = query.reshape(B, shared, H // shared, -1)
    options = {"dropout_p": how.get("dropout", 0.0), "scale": how.get("scaling")}
    out = functional.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, **options)
    return out.reshape(B, 1, H, -1), None


def _mask(attention_mask: Tensor | None = None, **asked: Any) -> Tensor | None:
    """sdpa's mask [B, 1, queries, L]; for one causal query it is the padding mask, which exists already."""
    if asked["q_length"] == 1 and asked["mask_function"] is causal_mask_function and attention_mask is not None:
        first = asked["kv_offset"]
        return attention_mask[:, None, None, first : first + asked["kv_length"]]
    return sdpa_mask(attention_mask=attention_mask, **asked)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _mask)
