"""Rollouts by transformers, with the same weights that are trained: nothing to synchronise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel

from opsd.model.stops import eos_token_ids
from opsd.model.vocabulary import vocabulary_size
from opsd.rollout.base import RolloutEngine, gather_rollouts, jobs_of
from opsd.rollout.decode import Row, decode, needs_like_lengths
from opsd.types import Prompt, Rollout, Sampling
from opsd.utils.distributed import ONE_RANK, Ranks


@dataclass
class _Answer:
    """A single unfinished answer: a Row of `opsd.rollout.decode`."""

    id: int
    prompt: Prompt
    limit: int
    eos_ids: frozenset[int]
    ids: list[int] = field(default_factory=list)
    done: bool = False

    def next(self, drawn: int) -> int | None:
        if not self.done:
            self.ids.append(drawn)
            self.done = drawn in self.eos_ids or len(self.ids) == self.limit
        return None if self.done else drawn

    def rollout(self) -> Rollout:
        return Rollout(self.id, self.prompt, self.ids, self.ids[-1] not in self.eos_ids)


class HFRollout(RolloutEngine):
    """RolloutEngine on a transformers model.

    model: a causal language model; it is in eval mode while sampling. batch_rollouts: number of rollouts per batch.
    context: context in which the model generates (compute dtype, gathered weights); it is entered on every rank, with
    or without work. vocab_size: only ids below it are sampled (None: all of the tokenizer's). switches: see `decode`.
    Draws depend only on (seed, rollout id). eos_ids: tokens that end a response (None: those that the model's
    generation config and the tokenizer name; nothing else in the generation config is used).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        batch_rollouts: int,
        context: Any = contextlib.nullcontext,
        ranks: Ranks = ONE_RANK,
        vocab_size: int | None = None,
        switches: frozenset[int] = frozenset(),
        eos_ids: Iterable[int] | None = None,
    ) -> None:
        self._model, self._batch_rollouts, self._context, self.ranks = model, batch_rollouts, context, ranks
        self.eos_ids = frozenset(eos_token_ids(model.generation_config, tokenizer) if eos_ids is None else eos_ids)
        self._given = switches
        self._vocab_size = vocab_size or vocabulary_size(tokenizer)

    @cached_property
    def switches(self) -> frozenset[int]:
        """See `decode`; if 0 is among them, only rows of the same length share a batch. Measured once, by every rank.

        Raises UserError if the model cannot be decoded with a cache.
        """
        return self._given | ({0} if needs_like_lengths(self._model, self._context) else set())

    def generate(self, prompts: list[Prompt], samples: int, sampling: Sampling, seed: int) -> list[Rollout]:
        """See RolloutEngine. Prompts of similar length share a batch, to keep padding small."""
        answers = [
            _Answer(number, prompt, sampling.max_new_tokens, self.eos_ids)
            for number, prompt in jobs_of(prompts, samples, self.ranks)
        ]
        self.grow(answers, sampling, seed)
        return gather_rollouts([answer.rollout() for answer in answers], self.ranks)

    def grow(self, rows: Sequence[Row], sampling: Sampling, seed: int) -> None:
        """Decode this rank's answers or episodes to their ends; see `decode`."""
        how = (self._batch_rollouts, self._context, sampling, self._vocab_size, seed, self.switches)
        decode(self._model, rows, *how)

    def sync(self) -> None:
        """Nothing to do: the sampler and the trainer share their weights."""


def cut_at_eos(response: list[int], eos_ids: list[int], max_new_tokens: int) -> tuple[list[int], bool]:
    """The ids up to and including the first EOS, and whether the length limit came first.

    Everything after EOS is padding, even if the padding id is EOS itself.
    """
    for place, token in enumerate(response):
        if token in eos_ids:
            return response[: place + 1], False
    return response[:max_new_tokens], True
