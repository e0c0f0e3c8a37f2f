"""The student's part of a step: score → select → loss → gradient → optimiser, over all micro-batches.

Legend: N student tokens of a micro-batch, D and E hidden sizes, V shared vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opsd.batch import MicroBatch
from opsd.config import LossConfig
from opsd.distill import DistillResult, concatenate_stats, distill_loss, token_stats
from opsd.distill.chunks import ChunkBound
from opsd.engine import Engine
from opsd.errors import RunStopped, StepUnusable
from opsd.hooks import Selection, TokenSelector, TokenStats
from opsd.memory import memory_for
from opsd.teacher import Teacher


@dataclass(frozen=True)
class Update:
    """What one update did. loss_nats: trained divergence per kept token. kept, tokens: counts over all ranks.

    grad_norm: before clipping. kept_N: the mask over all ranks' student tokens, rank by rank and there micro-batch by
    micro-batch. stats: their statistics; fields that nobody asked for are None. chunk_halvings: how often, since the
    update before and over all ranks, the loss ran out of memory and went on with half of the rows in a chunk.
    """

    loss_nats: float
    kept: int
    tokens: int
    grad_norm: float
    kept_N: Tensor
    stats: TokenStats
    chunk_halvings: int


class Updater:
    """Trains `engine`'s student towards `teacher`, on the tokens that `selector` keeps (None: all)."""

    def __init__(
        self, engine: Engine, teacher: Teacher, selector: TokenSelector | None, loss: LossConfig, vocab_size: int
    ) -> None:
        self._engine, self._ranks, self._teacher, self._selector = engine, engine.ranks, teacher, selector
        self._loss, self._vocab_size = loss, vocab_size
        self._chunks, self._halvings_told = ChunkBound(loss.chunk_tokens), 0

    def run(
        self,
        batches: list[MicroBatch],
        teacher_hidden: list[Tensor],
        lr: float,
        seed: int,
        watch: frozenset[str],
        rollout_weights: Tensor | None = None,
    ) -> Update:
        """One optimiser step. seed: decides random selection. watch: fields to score over all tokens as well.

        batches: this rank's share, as many as every other rank's (`opsd.batch.share`), with the teacher's states.
        rollout_weights: loss weight of each of the step's rollouts, by id; they never change the count.

        Watching changes nothing that is trained. Raises StepUnusable, on every rank and with all as it was before the
        step, where the step has no token to train on, or where the teacher's states, the loss or its gradient are not
        finite; RunStopped where a selector keeps another count than it announced, or where memory runs out.
        """
        try:
            self._check_usable(batches, teacher_hidden)
            return self._run(batches, teacher_hidden, lr, seed, watch, rollout_weights)
        except StepUnusable:
            if self._selector is not None:
                # Within a step its state stands still: loading it drops what it has seen of this one.
                self._selector.load_state_dict(self._selector.state_dict())
            raise

    def _run(
        self,
        batches: list[MicroBatch],
        teacher_hidden: list[Tensor],
        lr: float,
        seed: int,
        watch: frozenset[str],
        rollout_weights: Tensor | None,
    ) -> Update:
        """See `run`, on a step with tokens and a sound teacher."""
        pairs = list(zip(batches, teacher_hidden, strict=True))
        chosen: list[Selection | None] = [None] * len(pairs)
        scored = None
        with memory_for("student's forward and backward"):
            if watch or self._chooses_beforehand():
                scored = [self._score(micro, hidden_NE, watch) for micro, hidden_NE in pairs]
            if scored is not None and self._chooses_beforehand():
                chosen = self._choose(scored, seed)
            kept = self._kept_count(batches, chosen)
            results = [
                self._backward(micro, hidden_NE, selection, kept, seed, rollout_weights)
                for (micro, hidden_NE), selection in zip(pairs, chosen, strict=True)
            ]
        loss_nats = self._ranks.sum(sum(float(result.loss_sum) for result in results)) / kept
        kept_N = self._ranks.concatenate(torch.cat([result.kept_N for result in results]))
        if not math.isfinite(loss_nats):
            self._engine.discard()
            raise StepUnusable(f"the loss is {loss_nats} nats a token")
        if (found := int(kept_N.sum())) != kept:
            raise RunStopped(f"the selector kept {found} tokens, its budget() says {kept}: set fixed_budget False")
        with memory_for("optimiser"):
            grad_norm = self._engine.step(lr)
        if not math.isfinite(grad_norm):
            raise StepUnusable(f"the gradient's norm is {grad_norm}")
        if (end_step := getattr(self._selector, "end_step", None)) is not None:
            end_step(self._ranks.reduce)
        stats = self._of_all_ranks([result.stats for result in results] if scored is None else scored)
        return Update(loss_nats, kept, kept_N.numel(), grad_norm, kept_N, stats, self._new_halvings())

    def _check_usable(self, batches: list[MicroBatch], teacher_hidden: list[Tensor]) -> None:
        """Raises StepUnusable, on every rank, where none has a token, or where a teacher gave what is no number."""
        tokens = sum(micro.student_tokens() for micro in batches)
        # Summed by rows: a mask of every number would be a quarter of the states themselves.
        bad = sum(int((~hidden_NE.sum(-1, dtype=torch.float32).isfinite()).sum()) for hidden_NE in teacher_hidden)
        found = self._ranks.gather((tokens, bad))
        if not sum(tokens for tokens, _ in found):
            raise StepUnusable("there is no token to train on: every rollout is empty")
        if bad := sum(bad for _, bad in found):
            raise StepUnusable(f"the teacher's states of {bad} tokens are not finite")

    def _new_halvings(self) -> int:
        """The chunk bound's halvings since the last update, over all ranks."""
        told, self._halvings_told = self._halvings_told, self._chunks.halvings
        return int(self._ranks.sum(self._halvings_told - told))

    def _chooses_beforehand(self) -> bool:
        """Whether masks must be known before the first gradient: they depend on the whole step, or the count does."""
        selector = self._selector
        return selector is not None and (selector.normalise_over == "batch" or not selector.fixed_budget)

    @torch.no_grad()
    def _score(self, micro: MicroBatch, teacher_NE: Tensor, watch: frozenset[str]) -> TokenStats:
        """One micro-batch's statistics: those watched, and what a choice made beforehand reads."""
        needs = watch
        if self._selector is not None and self._chooses_beforehand():
            needs = needs | self._selector.needs | self._selector.needs_kept

        def use(student_ND: Tensor, head_VD: Tensor) -> TokenStats:
            states_NE = teacher_NE.to(student_ND.device, non_blocking=True)
            return token_stats(student_ND, head_VD, states_NE, self._teacher.head(), needs=needs, **self._common(micro))

        return self._engine.forward(micro, use)

    def _choose(self, scored: list[TokenStats], seed: int) -> list[Selection | None]:
        """The selector's choice in every micro-batch, in sight of the whole step."""
        selector = self._selector
        assert selector is not None
        if selector.normalise_over == "batch":
            selector.prepare(self._of_all_ranks(scored))
        weigh = getattr(selector, "weigh", None) if selector.needs_kept else None
        selections = [selector(stats, seed) for stats in scored]
        if weigh is None:
            return [*selections]
        return [weigh(stats, selection) for stats, selection in zip(scored, selections, strict=True)]

    def _of_all_ranks(self, parts: list[TokenStats]) -> TokenStats:
        """The whole step's statistics, on every rank; a field is None where any micro-batch of any rank lacks it."""
        own = concatenate_stats(parts)
        fields = {name: value for name, value in vars(own).items() if isinstance(value, Tensor)}
        common = set.intersection(*self._ranks.gather(set(fields)))
        joined = {name: self._ranks.concatenate(fields[name]) if name in common else None for name in sorted(fields)}
        return dataclasses.replace(own, **joined)

    def _kept_count(self, batches: list[MicroBatch], chosen: list[Selection | None]) -> int:
        """How many tokens the step trains on, over all ranks: what the loss is divided by, once."""
        kept = 0
        for micro, selection in zip(batches, chosen, strict=True):
            if selection is not None:
                kept += int(selection.kept_N.sum())
            elif self._selector is None:
                kept += micro.student_tokens()
            else:
                lengths = micro.rollout_N.unique(return_counts=True)[1]
                kept += sum(self._selector.budget(length) for length in lengths.tolist())
        total = int(self._ranks.sum(kept))
        if not total:
            raise StepUnusable("there is no token to train on: the selector kept none")
        return total

    def _backward(
        self,
        micro: MicroBatch,
        teacher_NE: Tensor,
        selection: Selection | None,
        kept: int,
        seed: int,
        rollout_weights: Tensor | None,
    ) -> DistillResult:
        """Add one micro-batch's gradient; its result, the graph let go."""
        weight_N = (
            None if rollout_weights is None else rollout_weights[micro.rollout_N.cpu()].to(micro.rollout_N.device)
        )
        if selection is not None and selection.weight_N is not None:
            weight_N = selection.weight_N if weight_N is None else selection.weight_N * weight_N

        def use(student_ND: Tensor, head_VD: Tensor) -> DistillResult:
            return distill_loss(
                student_ND,
                head_VD,
                teacher_NE.to(student_ND.device, non_blocking=True),
                self._teacher.head(),
                selector=self._selector if selection is None else None,
                kept_N=None if selection is None else selection.kept_N,
                weight_N=weight_N,
                divergence=self._loss.divergence,
                beta=self._loss.beta,
                memory=self._loss.memory,
                seed=seed,
                **self._common(micro),
            )

        result = self._engine.forward(micro, use)
        self._engine.backward(result.loss_sum, kept)
        return dataclasses.replace(result, loss_sum=result.loss_sum.detach())

    def _common(self, micro: MicroBatch) -> dict[str, Any]:
        return {
            "rollout_N": micro.rollout_N,
            "token_ids_N": micro.token_ids_N,
            "vocab_size": self._vocab_size,
            "temperature": self._loss.temperature,
            "chunk_tokens": self._chunks,
        }
