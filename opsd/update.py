"""The student's part of a step: score → select → loss → gradient → optimiser, over all micro-batches.

Legend: N student tokens of a micro-batch, D and E hidden sizes, V shared vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from opsd.config import LossConfig
from opsd.distill import DistillResult, concatenate_stats
from opsd.distill.chunks import ChunkBound
from opsd.distill.inputs import Inputs, LossSpec, check_inputs
from opsd.distill.loss import distill
from opsd.distill.select import Choice, weigh
from opsd.distill.stats import build_stats, check_needs, score_rows
from opsd.engine import Engine
from opsd.selection import Selection, TokenSelector, TokenStats
from opsd.teacher import Teacher
from opsd.types import MicroBatch
from opsd.utils.errors import RunStopped, StepUnusable
from opsd.utils.oom import memory_for


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
        self._vocab_size = vocab_size
        self._chunks, self._halvings_told = ChunkBound(loss.chunk_tokens), 0
        self._spec = LossSpec(loss.divergence, loss.beta, loss.temperature, self._chunks, loss.memory)

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

        batches: this rank's share, as many as every other rank's (`share`), with the teacher's states.
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
        with memory_for("student's forward and backward"):
            choices, scored = self._choices(pairs, seed, watch)
            counts_late = any(choice.whole_step for choice in choices) and not self._count_is_known()
            kept = 0 if counts_late else self._kept_count(batches, choices)
            results = []
            for (micro, hidden_NE), choice in zip(pairs, choices, strict=True):
                result = self._forward(micro, hidden_NE, choice, rollout_weights)
                if counts_late:
                    kept = self._kept_count(batches, [Choice(selection=Selection(result.kept_N))])
                self._engine.backward(result.loss_sum, kept)
                # The graph is let go.
                results.append(dataclasses.replace(result, loss_sum=result.loss_sum.detach()))
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

    def _choices(
        self, pairs: list[tuple[MicroBatch, Tensor]], seed: int, watch: frozenset[str]
    ) -> tuple[list[Choice], list[TokenStats] | None]:
        """How each micro-batch's tokens are chosen, and its statistics where they had to be taken first.

        That is where a choice needs sight of the whole step, or the count does, and the step has several micro-batches.
        """
        selector = self._selector
        if self._ranks.world_size == 1 and len(pairs) == 1:
            return [Choice(selector, seed=seed, watch=watch, whole_step=True)], None
        if selector is None or (selector.normalise_over != "batch" and self._count_is_known()):
            return [Choice(selector, seed=seed, watch=watch)] * len(pairs), None
        scored = [self._score(micro, hidden_NE, watch) for micro, hidden_NE in pairs]
        return [Choice(selection=selection) for selection in self._choose(scored, seed)], scored

    def _count_is_known(self) -> bool:
        """Whether the kept count follows from lengths alone."""
        return self._selector is None or self._selector.fixed_budget

    @torch.no_grad()
    def _score(self, micro: MicroBatch, teacher_NE: Tensor, watch: frozenset[str]) -> TokenStats:
        """One micro-batch's statistics: those watched, and what a choice made beforehand reads."""
        assert self._selector is not None
        needs = watch | self._selector.needs | self._selector.needs_kept

        def use(student_ND: Tensor, head_VD: Tensor) -> TokenStats:
            inputs = self._inputs(student_ND, head_VD, teacher_NE, micro)
            return build_stats(inputs, score_rows(inputs, check_needs(needs, inputs), self._spec))

        return self._engine.forward(micro, use)

    def _choose(self, scored: list[TokenStats], seed: int) -> list[Selection]:
        """The selector's choice in every micro-batch, in sight of the whole step."""
        selector = self._selector
        assert selector is not None
        if selector.normalise_over == "batch":
            selector.prepare(self._of_all_ranks(scored))
        return [weigh(selector, stats, selector(stats, seed)) for stats in scored]

    def _of_all_ranks(self, parts: list[TokenStats]) -> TokenStats:
        """The whole step's statistics, on every rank; a field is None where any micro-batch of any rank lacks it."""
        own = concatenate_stats(parts)
        fields = {name: value for name, value in vars(own).items() if isinstance(value, Tensor)}
        common = set.intersection(*self._ranks.gather(set(fields)))
        joined = {name: self._ranks.concatenate(fields[name]) if name in common else None for name in sorted(fields)}
        return dataclasses.replace(own, **joined)

    def _kept_count(self, batches: list[MicroBatch], choices: list[Choice]) -> int:
        """How many tokens the step trains on, over all ranks: what the loss is divided by, once."""
        kept = 0
        for micro, choice in zip(batches, choices, strict=True):
            if choice.selection is not None:
                kept += int(choice.selection.kept_N.sum())
            elif self._selector is None:
                kept += micro.student_tokens()
            else:
                lengths = micro.rollout_N.unique(return_counts=True)[1]
                kept += sum(self._selector.budget(length) for length in lengths.tolist())
        total = int(self._ranks.sum(kept))
        if not total:
            raise StepUnusable("there is no token to train on: the selector kept none")
        return total

    def _forward(
        self, micro: MicroBatch, teacher_NE: Tensor, choice: Choice, rollout_weights: Tensor | None
    ) -> DistillResult:
        """One micro-batch's loss, on the tokens chosen before it or within it."""
        weight_N = None
        if rollout_weights is not None:
            weight_N = rollout_weights[micro.rollout_N.cpu()]

        def use(student_ND: Tensor, head_VD: Tensor) -> DistillResult:
            inputs = self._inputs(student_ND, head_VD, teacher_NE, micro, weight_N)
            # The inputs know what products are taken in; a selector's own arithmetic is not to be rounded.
            with torch.autocast(student_ND.device.type, enabled=False):
                return distill(inputs, choice, self._spec)

        return self._engine.forward(micro, use)

    def _inputs(
        self,
        student_ND: Tensor,
        head_VD: Tensor,
        teacher_NE: Tensor,
        micro: MicroBatch,
        weight_N: Tensor | None = None,
    ) -> Inputs:
        return check_inputs(
            student_ND,
            head_VD,
            teacher_NE.to(student_ND.device, non_blocking=True),
            self._teacher.head(),
            vocab_size=self._vocab_size,
            rollout_N=micro.rollout_N,
            token_ids_N=micro.token_ids_N,
            weight_N=weight_N,
        )
