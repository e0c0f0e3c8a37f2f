"""The decode loop: a batch of rows on one KV cache, token by token, until each row is done.

Legend: B rows, L tokens so far, prompts padded on the left, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import groupby, islice
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsd.model.attention import compute_dtype
from opsd.model.checks import ALLOWED, ALLOWED_ROUNDED, difference
from opsd.rollout.attention import decode_attention, new_cache
from opsd.rollout.onednn import onednn_weights
from opsd.rollout.sampling import Draws
from opsd.types import Prompt, Sampling
from opsd.utils.errors import UserError, is_out_of_memory, said

# Prompt lengths of the probe, in tokens: different ones and equal ones; and the number of tokens fed after them.
UNLIKE, ALIKE, FED = (12, 3), (12, 12), 3


class Row(Protocol):
    """One answer as it grows."""

    @property
    def id(self) -> int:
        """The rollout's id: the row's draws depend only on it and on the seed."""
        ...

    @property
    def prompt(self) -> Prompt:
        """The prompt, which is read first."""
        ...

    def next(self, drawn: int) -> int | None:
        """The token that follows: `drawn`, or another instead; None after the row's end.

        Called once per token, and also after the end while other rows are unfinished.
        """
        ...


AnyRow = TypeVar("AnyRow", bound=Row)


def decode(
    model: PreTrainedModel,
    rows: Sequence[AnyRow],
    batch_rollouts: int,
    context: Callable[[], AbstractContextManager[Any]],
    sampling: Sampling,
    vocab_size: int,
    seed: int,
    switches: frozenset[int] = frozenset(),
) -> None:
    """Decode every row to its end, in batches of `batch_rollouts` rows of similar length; the model is in eval mode.

    context: entered even if there are no rows. A row takes at most sampling.max_new_tokens tokens. switches: lengths
    beyond which the model's outputs change for the whole sequence (`opsd.model.checks.length_switches`); then only
    rows of the same length share a batch, and the sequence is recomputed when it passes such a length. If 0 is among
    them, only rows of the same length share a batch, until the last one ends (`needs_like_lengths`).
    """
    rows = sorted(rows, key=lambda row: (len(row.prompt.ids), row.id))
    side_by_side = min(batch_rollouts, len(rows))
    with (
        _eval_mode(model),
        context(),
        decode_attention(model),
        onednn_weights(model, side_by_side, sampling.max_new_tokens),
        _inference(model),
    ):
        for _, alike in groupby(rows, key=lambda row: len(row.prompt.ids) if switches else 0):
            while some := list(islice(alike, batch_rollouts)):
                _decode_batch(model, some, sampling, vocab_size, seed, switches)


@torch.no_grad()
def needs_like_lengths(model: PreTrainedModel, context: Callable[[], AbstractContextManager[Any]]) -> bool:
    """Whether only rows of the same length can be decoded in a batch, because padding changes the model's outputs.

    Measured against the model without a cache. Raises UserError if rows of the same length differ from it too.
    """
    with _eval_mode(model), context(), decode_attention(model), _inference(model):
        try:
            if _decodes(model, UNLIKE):
                return False
        except Exception as error:  # e.g. if rows cannot be removed from the cache; with equal lengths none are
            if is_out_of_memory(error):
                raise
        name = f"model {model.name_or_path}"
        what, give = f"{name}: transformers cannot sample from it here", "give another model, or sample with vLLM"
        with said(what, give):
            if _decodes(model, ALIKE):
                return True
    raise UserError(f"{what} (with its cache it gives other values than for the whole sequence); {give}")


def _decodes(model: Any, lengths: tuple[int, ...]) -> bool:
    """Whether rows decoded in a batch have the logits of their whole sequences; if their lengths differ, the last row
    continues alone."""
    ids_BL = torch.arange(5, 5 + len(lengths) * (max(lengths) + FED)) % model.config.get_text_config().vocab_size
    rows = [ids[: length + FED] for ids, length in zip(ids_BL.view(len(lengths), -1), lengths, strict=True)]
    whole = [model(input_ids=row[None].to(model.device), use_cache=False).logits[0] for row in rows]
    batch = _Batch(model, [row[:-FED].tolist() for row in rows], FED)
    for place in range(-FED, 0):
        own_BV = torch.stack([logits[place - 1] for logits in whole])
        gap = difference(batch.logits(), own_BV)
        # Non-finite values are not the cache's fault; sampling stops at them.
        if own_BV.isfinite().all() and gap > ALLOWED.get(compute_dtype(own_BV), ALLOWED_ROUNDED):
            return False
        if place == -2 and lengths == UNLIKE:
            batch.keep([1])
            rows, whole = rows[1:], whole[1:]
        batch.append([int(row[place]) for row in rows])
    return True


def _decode_batch(
    model: PreTrainedModel,
    rows: Sequence[Row],
    sampling: Sampling,
    vocab_size: int,
    seed: int,
    switches: frozenset[int] = frozenset(),
) -> None:
    """See `decode`; for the rows of one batch."""
    batch = _Batch(model, [row.prompt.ids for row in rows], sampling.max_new_tokens, switches)
    draws = Draws(seed, [row.id for row in rows], sampling, vocab_size, model.device)
    for place in range(sampling.max_new_tokens):
        drawn = draws(batch.logits(), place)
        fed = [row.next(token) for row, token in zip(rows, drawn, strict=True)]
        busy = [number for number, token in enumerate(fed) if token is not None]
        if not busy:
            return
        if 0 not in switches and 2 * len(busy) <= len(rows):
            # At least half are finished: continue with the others alone.
            rows, fed = [rows[number] for number in busy], [fed[number] for number in busy]
            batch.keep(busy)
            draws.keep(busy)
        batch.append([0 if token is None else token for token in fed])


class _Batch:
    """A batch of rows and their cache. limit: maximum number of tokens to add. switches: see `decode`."""

    def __init__(
        self, model: PreTrainedModel, prompts: list[list[int]], limit: int, switches: frozenset[int] = frozenset()
    ) -> None:
        self._model: Any = model
        self._switches = switches
        self._width = max(map(len, prompts))
        self._length, self._new = self._width, self._width
        self._ids_BL = torch.zeros(len(prompts), self._width + limit, dtype=torch.int64)
        self._mask_BL = torch.ones_like(self._ids_BL)
        for row, ids in enumerate(prompts):
            start = self._width - len(ids)
            # Padding may be any id: it is masked.
            self._mask_BL[row, :start] = 0
            self._ids_BL[row, start : self._width] = torch.tensor(ids)
        self._ids_BL, self._mask_BL = self._ids_BL.to(model.device), self._mask_BL.to(model.device)
        takes = inspect.signature(model.forward).parameters
        self._options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._has_positions = "position_ids" in takes
        # Purely recurrent models use another name for it.
        self._cache_name = "cache_params" if "cache_params" in takes else "past_key_values"
        self._start_again()

    def logits(self) -> Tensor:
        """Logits of the next tokens, fp32 [B, V]; computes the tokens added since the last call."""
        if self._new == 1 and self._length - 1 in self._switches:
            self._start_again()
        inputs = self._model.prepare_inputs_for_generation(
            self._ids_BL[:, : self._length],
            next_sequence_length=self._new,
            is_first_iteration=self._new == self._length,
            attention_mask=self._mask_BL[:, : self._length],
            use_cache=True,
            **{self._cache_name: self._cache},
            **({"position_ids": self._positions_BL} if self._has_positions else {}),
            **self._options,
        )
        out = self._model(**inputs, return_dict=True)
        self._cache = out.get(self._cache_name, self._cache)
        return out.logits[:, -1].float()

    def _start_again(self) -> None:
        """Recompute everything so far in the next call of `logits`."""
        model, self._new = self._model, self._length
        self._cache: Any = new_cache(model.config, self._ids_BL.shape[1]) if _takes_caches(model) else None
        self._positions_BL = (self._mask_BL[:, : self._length].cumsum(-1) - 1).clamp_(min=0)

    def append(self, tokens: list[int]) -> None:
        """Add one token per row."""
        self._ids_BL[:, self._length] = torch.tensor(tokens, device=self._ids_BL.device)
        self._length, self._new = self._length + 1, 1
        self._positions_BL = self._positions_BL[:, -1:] + 1

    def keep(self, places: list[int]) -> None:
        """Continue with these rows only."""
        places_B = torch.tensor(places, device=self._ids_BL.device)
        self._cache.reorder_cache(places_B)
        self._ids_BL, self._mask_BL = self._ids_BL[places_B], self._mask_BL[places_B]
        self._positions_BL = self._positions_BL[places_B]


def _takes_caches(model: PreTrainedModel) -> bool:
    """Whether the model works with transformers' caches, as nearly all do; others make their own."""
    return model._supports_default_dynamic_cache()  # pyrefly: ignore[not-callable] (GenerationMixin's)


@contextmanager
def _inference(model: PreTrainedModel) -> Iterator[None]:
    """torch's inference mode that leaves no inference tensors in the model, because training continues with it.

    Some models create and keep tensors while they run (rotary frequencies for longer texts).
    """
    try:
        with torch.inference_mode():
            yield
    finally:
        # The cache has the weights that autocast has cast.
        torch.clear_autocast_cache()
        for module in model.modules():
            for held in (vars(module), module._buffers):
                for name, value in held.items():
                    if isinstance(value, Tensor) and value.is_inference():
                        held[name] = value.clone()


@contextmanager
def _eval_mode(model: PreTrainedModel) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        # Restore each module: while training, only some are in training mode (`Scorer.train`).
        for module in training:
            module.training = True
