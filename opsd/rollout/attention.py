"""What decoding needs of transformers' caches and attention, without the copies that they make for every token.

Both sit where transformers lets users put their own: a cache layer, and an attention function with its mask function.
Whatever is not the plain case (windows, recurrent states, several queries, other kernels) stays transformers' own.

Legend: B rows, L tokens in the cache, H heads, of which G share a key-value head, D head size.
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
# Room that a cache layer takes beyond its tokens, at least.
BLOCK_TOKENS = 64


class GrowingLayer(DynamicLayer):
    """A cache layer with room for the tokens to come: a new one is written into its place, nothing else is moved.

    limit: tokens that it will ever hold. Room is taken by halves of the length, so that short answers do not pay for
    the longest. Keys and values are views of the used part: attention reads nothing else.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit
        self._room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values [B, H / G, L, D], the new ones included, in the type that attention multiplies.

        Under autocast keys come in fp32, which norms and rotations give: kept so, they would take twice the memory, and
        attention would round all of them for every token.
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
        """Keep these rows, in this order."""
        if self._room is not None:
            length = self.get_seq_length()
            self._room = self._room[0][beam_idx], self._room[1][beam_idx]
            self.keys, self.values = (room[:, :, :length] for room in self._room)

    @staticmethod
    def _grown(new: Tensor, old: Tensor | None, tokens: int) -> Tensor:
        """Room for `tokens` tokens, shaped as `new`, that begins with `old`."""
        room = new.new_empty(*new.shape[:2], tokens, new.shape[-1])
        if old is not None and old.numel():
            room[:, :, : old.shape[-2]] = old
        return room


def new_cache(config: PreTrainedConfig, limit: int) -> DynamicCache:
    """transformers' own cache for a model, whose plain layers have room for `limit` tokens."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer(limit) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@contextmanager
def decode_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within it a model whose attention is one that training chooses reads its cache as it lies, by sdpa.

    Rows side by side are padded at the left: attention of variable length would take the padding out, and put it back,
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
    """sdpa; one query per row [B, H, 1, D] is taken as G queries of each key-value head, which need no copy of it."""
    (B, H, queries, _), shared = query.shape, key.shape[1]
    by_head = attention_mask is not None and attention_mask.shape[1] != 1
    if queries != 1 or shared == H or by_head or how.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **how)
    grouped = query.reshape(B, shared, H // shared, -1)
    options = {"dropout_p": how.get("dropout", 0.0), "scale": how.get("scaling")}
    out = functional.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, **options)
    return out.reshape(B, 1, H, -1), None


def _mask(attention_mask: Tensor | None = None, **asked: Any) -> Tensor | None:
    """sdpa's mask [B, 1, queries, L]; that of one causal query is the padding's, which is there already."""
    if asked["q_length"] == 1 and asked["mask_function"] is causal_mask_function and attention_mask is not None:
        first = asked["kv_offset"]
        return attention_mask[:, None, None, first : first + asked["kv_length"]]
    return sdpa_mask(attention_mask=attention_mask, **asked)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _mask)
