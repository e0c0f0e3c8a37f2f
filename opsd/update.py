"""What an update needs besides the engine: which tokens of a step are trained on, and what their loss is divided by.

Legend: N student tokens of a micro-batch, D and E hidden sizes, V shared vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from opsd.config import LossConfig, TrainConfig
from opsd.distill import DistillResult
from opsd.distill.chunks import ChunkBound
from opsd.distill.inputs import Inputs, LossSpec, check_inputs
from opsd.distill.select import Choice, StopToken, choose_beforehand
from opsd.distill.stats import build_stats, check_needs, join_ranks, score_rows
from opsd.engine import Engine
from opsd.selection import TokenSelector, TokenStats, with_defaults
from opsd.teacher import Teacher
from opsd.types import NO_STOPS, Head, MicroBatch, Rollout, Stops
from opsd.utils.errors import RunStopped, StepUnusable, UserError


@dataclass(frozen=True)
class Update:
    """What one update did. loss_nats: trained divergence per kept token. kept, tokens: counts over all ranks.

    grad_norm: before clipping. kept_N: the mask over all ranks' student tokens, in order of rank, then micro-batch.
    stats: their statistics; fields that were not requested are None. chunk_halvings: how often, since the previous
    update and over all ranks, the loss ran out of memory and continued with half as many rows per chunk. teachers: if
    there are several, by name, the divergence per kept token and the number of kept tokens of each.
    """

    loss_nats: float
    kept: int
    tokens: int
    grad_norm: float
    kept_N: Tensor
    stats: TokenStats
    chunk_halvings: int
    teachers: dict[str, tuple[float, int]] = field(default_factory=dict)


@dataclass
class StepPlan:
    """How each micro-batch's tokens are chosen. kept: count over all ranks; 0 if the loss is yet to choose.

    scored: the micro-batches' statistics, if they had to be computed before the choice.
    """

    choices: list[Choice]
    scored: list[TokenStats] | None
    kept: int


class StepPlanner:
    """Plans each step for one selector (None: every token is kept) and one divergence, over all ranks.

    stops: the tokens that end a turn; stop_token: see `opsd.distill.select.with_stops`.
    """

    def __init__(
        self,
        engine: Engine,
        teacher: Teacher,
        selector: TokenSelector | None,
        loss: LossConfig,
        vocab_size: int,
        stops: Stops = NO_STOPS,
        stop_token: StopToken = "as_scored",
    ) -> None:
        self._engine, self._ranks, self._teacher = engine, engine.ranks, teacher
        self._selector = None if selector is None else with_defaults(selector)
        self._vocab_size, self._stops = vocab_size, stops
        self._stop_token: StopToken = stop_token if stops.ids else "as_scored"
        self._chunks, self._halvings_told = ChunkBound(loss.chunk_tokens), 0
        self._config = loss
        self.loss = self.loss_at(1)

    def loss_at(self, step: int) -> LossSpec:
        """The loss of 1-based `step`."""
        c = self._config
        how = (c.beta, c.temperature, self._chunks, c.memory, c.entropy_threshold)
        return LossSpec(c.divergence_at(step), *how)

    def plan(self, micros: list[MicroBatch], teacher: list[Tensor], seed: int, watched: frozenset[str]) -> StepPlan:
        """The step's plan. seed: decides random selection. watched: statistics to compute over all tokens as well.

        Masks are made beforehand if the choice or its count depends on the whole step and the step has several
        micro-batches; otherwise within the loss, without another forward pass. Raises StepUnusable, on every rank, if
        there is no token to train on, or if the teacher's states are not finite.
        """
        self._check_usable(micros, teacher)
        selector = self._selector
        if self._ranks.world_size == 1 and len(micros) == 1:
            choice = Choice(selector, seed=seed, watch=watched, whole_step=True, stop_token=self._stop_token)
            return StepPlan([choice], None, self._announced(micros) if self._count_is_known() else 0)
        if selector is None or (selector.normalise_over != "batch" and self._count_is_known()):
            choices = [Choice(selector, seed=seed, watch=watched, stop_token=self._stop_token)] * len(micros)
            return StepPlan(choices, None, self._announced(micros))
        scored = [self._score(micro, teacher_NE, watched) for micro, teacher_NE in zip(micros, teacher, strict=True)]
        selections = choose_beforehand(selector, scored, self._ranks, seed, self._stop_token)
        kept = self._total(sum(int(selection.kept_N.sum()) for selection in selections))
        return StepPlan([Choice(selection=selection) for selection in selections], scored, kept)

    def inputs(
        self,
        student_ND: Tensor,
        head: Head,
        micro: MicroBatch,
        teacher_NE: Tensor,
        rollout_weights: Tensor | None = None,
    ) -> Inputs:
        """The loss core's inputs for one micro-batch, checked once. rollout_weights: by rollout id."""
        return check_inputs(
            student_ND,
            head,
            teacher_NE.to(student_ND.device, non_blocking=True),
            self._teacher.head_for(micro),
            vocab_size=self._vocab_size,
            rollout_N=micro.rollout_N,
            token_ids_N=micro.token_ids_N,
            weight_N=None if rollout_weights is None else rollout_weights[micro.rollout_N.cpu()],
            stops=self._stops,
            temperature=self.loss.temperature,
        )

    def denominator(self, plan: StepPlan, result: DistillResult) -> int:
        """The loss's denominator: the kept tokens over all micro-batches and ranks."""
        plan.kept = plan.kept or self._total(int(result.kept_N.sum()))
        return plan.kept

    def check_results(self, plan: StepPlan, results: list[DistillResult]) -> None:
        """Called before the optimiser's step. Raises StepUnusable if the loss is not finite; RunStopped if the selector
        kept a different count than it announced."""
        loss_nats = self._loss_nats(plan, results)
        if not math.isfinite(loss_nats):
            self._engine.discard()
            raise StepUnusable(f"the loss is {loss_nats} nats per token")
        if (found := int(self._ranks.sum(sum(int(result.kept_N.sum()) for result in results)))) != plan.kept:
            raise RunStopped(f"the selector kept {found} tokens, its budget() says {plan.kept}: set fixed_budget False")

    def end_step(
        self, plan: StepPlan, micros: list[MicroBatch], results: list[DistillResult], grad_norm: float
    ) -> Update:
        """End the selector's step and report the update. Raises StepUnusable if the gradient is not finite; the engine
        then took no step."""
        if not math.isfinite(grad_norm):
            raise StepUnusable(f"the gradient's norm is {grad_norm}")
        if self._selector is not None:
            self._selector.end_step(self._ranks.reduce)
        scored = [result.stats for result in results] if plan.scored is None else plan.scored
        stats = join_ranks(scored, self._ranks)
        kept_N = self._ranks.concatenate(torch.cat([result.kept_N for result in results]))
        told, self._halvings_told = self._halvings_told, self._chunks.halvings
        halvings = int(self._ranks.sum(self._halvings_told - told))
        loss_nats, teachers = self._loss_nats(plan, results), self._by_teacher(micros, results)
        return Update(loss_nats, plan.kept, kept_N.numel(), grad_norm, kept_N, stats, halvings, teachers)

    def forget_step(self) -> None:
        """Reset the selector: its state does not change within a step, so reloading it undoes `prepare`."""
        if self._selector is not None:
            self._selector.load_state_dict(self._selector.state_dict())

    def _loss_nats(self, plan: StepPlan, results: list[DistillResult]) -> float:
        return self._ranks.sum(sum(float(result.loss_sum) for result in results)) / plan.kept

    def _by_teacher(self, micros: list[MicroBatch], results: list[DistillResult]) -> dict[str, tuple[float, int]]:
        own: dict[str, tuple[float, int]] = {}
        for micro, result in zip(micros, results, strict=True):
            nats, kept = own.get(micro.teacher, (0.0, 0))
            own[micro.teacher] = nats + float(result.loss_sum), kept + int(result.kept_N.sum())
        found: dict[str, tuple[float, int]] = {}
        for name in sorted(own.keys() - {""}):
            nats, kept = map(self._ranks.sum, own[name])
            found[name] = nats / max(1, kept), int(kept)
        return found

    def _check_usable(self, micros: list[MicroBatch], teacher: list[Tensor]) -> None:
        """Raises StepUnusable, on every rank, if none has a token, or if a teacher's states are not finite."""
        tokens = sum(micro.student_tokens() for micro in micros)
        # Sum each row first: a mask over all elements would take a quarter of the states' own memory.
        bad = sum(int((~hidden_NE.sum(-1, dtype=torch.float32).isfinite()).sum()) for hidden_NE in teacher)
        found = self._ranks.gather((tokens, bad))
        if not sum(tokens for tokens, _ in found):
            raise StepUnusable("there is no token to train on: every rollout is empty, or was truncated and dropped")
        if bad := sum(bad for _, bad in found):
            raise StepUnusable(f"the teacher's states of {bad} tokens are not finite")

    def _count_is_known(self) -> bool:
        """Whether the kept count follows from the rollouts alone; without a selector it does for any stop_token."""
        return self._selector is None or (self._selector.fixed_budget and self._stop_token == "as_scored")

    @torch.no_grad()
    def _score(self, micro: MicroBatch, teacher_NE: Tensor, watched: frozenset[str]) -> TokenStats:
        """One micro-batch's statistics: the watched ones, and those the selector needs."""
        assert self._selector is not None
        needs = watched | self._selector.needs | self._selector.needs_kept

        def use(student_ND: Tensor, head: Head) -> TokenStats:
            inputs = self.inputs(student_ND, head, micro, teacher_NE)
            return build_stats(inputs, score_rows(inputs, check_needs(needs, inputs), self.loss))

        return self._engine.forward(micro, use)

    def _announced(self, micros: list[MicroBatch]) -> int:
        """The step's kept count, from its rollouts."""
        if self._selector is None:
            return self._total(sum(micro.student_tokens() - self._left_stops(micro) for micro in micros))
        lengths = [count for micro in micros for count in micro.rollout_N.unique(return_counts=True)[1].tolist()]
        return self._total(sum(self._selector.budget(length) for length in lengths))

    def _left_stops(self, micro: MicroBatch) -> int:
        """How many of a micro-batch's tokens are left out because they end a turn."""
        if self._stop_token != "never":
            return 0
        return sum(int((micro.token_ids_N == token).sum()) for token in self._stops.ids)

    def _total(self, kept: int) -> int:
        """The sum over all ranks. Raises StepUnusable if it is 0."""
        total = int(self._ranks.sum(kept))
        if not total:
            raise StepUnusable("there is no token to train on: the selector kept none")
        return total


def rollout_weights(rollouts: list[Rollout], rewards: list[float] | None, config: TrainConfig) -> Tensor | None:
    """The loss weight of each of a step's rollouts; None if the settings ask for none, or there are no rewards."""
    loss, samples = config.loss, config.rollout.samples_per_prompt
    if not loss.reads_rewards or rewards is None:
        return None
    prompts = [rollout.id // samples for rollout in rollouts]
    weights = torch.ones(len(rewards))
    if loss.reward_beta:
        weights = reward_weights(rewards, prompts, loss.reward_beta)
    return weights * paced_weights(rewards, prompts) if loss.prompt_weights == "paced" else weights


def reward_weights(rewards: Sequence[float], prompt_ids: Sequence[Hashable], beta: float) -> Tensor:
    """n·softmax(reward/β) over each prompt's n rollouts: a loss weight per rollout, fp32 (the base repository's
    OPD_REWARD_BETA).

    A prompt's better rollouts count for more. Its weights have mean 1; β → ∞ gives all ones. Compute them over whole
    prompts, before rollouts are spread over micro-batches. Errors: UserError for β ≤ 0 or lists of different lengths.
    """
    if not beta > 0:
        raise UserError(f"reward weights: beta {beta}: give a number above 0")
    if len(rewards) != len(prompt_ids):
        raise UserError(f"{len(rewards)} rewards for {len(prompt_ids)} rollouts: give one each")
    members: dict[Hashable, list[int]] = {}
    for place, prompt in enumerate(prompt_ids):
        members.setdefault(prompt, []).append(place)
    weights = torch.empty(len(rewards))
    for places in members.values():
        scaled = torch.tensor([rewards[place] for place in places], dtype=torch.float64) / beta
        weights[places] = (len(places) * scaled.softmax(0)).float()
    return weights


def paced_weights(rewards: Sequence[float], prompt_ids: Sequence[Hashable]) -> Tensor:
    """w = p·(1−p) of each rollout's prompt, p its mean reward, scaled to mean 1 over the step's rollouts, fp32.

    After PACED (arXiv 2603.11178): prompts that the student always or never gets right teach little. Our reading: p is
    measured on this step's rollouts, while the paper measures it beforehand; if every w is 0, all weights are 1.
    """
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompt_ids))}
    prompt_N = torch.tensor([numbers[prompt] for prompt in prompt_ids])
    reward_N = torch.tensor(rewards, dtype=torch.float64)
    rate_P = torch.bincount(prompt_N, reward_N) / torch.bincount(prompt_N)
    weight_N = (rate_P * (1.0 - rate_P)).clamp_min(0.0)[prompt_N]
    return (weight_N / weight_N.mean()).float() if weight_N.any() else torch.ones(len(rewards))
