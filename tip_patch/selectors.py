"""The paper's selection rules: which of a rollout's tokens are trained on.

Every rule keeps ⌊ρm⌋ (at least one) of a rollout's m student tokens, known from its length alone. h is the student's
entropy and δ = KL(P_S‖P_T) the reverse KL, in nats; ĥ and δ̂ are these normalised to [0, 1] (`normalise.py`).
The first line of each class is what `opsd selectors` prints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from opsd.config.settings import PositiveFloat
from opsd.selection import Selection, TokenStats
from tip_patch.groups import Rollouts
from tip_patch.sampling import inclusion_probabilities, successive_keys, systematic_mask, uniform_draws
from tip_patch.selector import NormalisingSelector, Selector, read_field


@dataclass(eq=False)
class EntropySample(Selector):
    """Draw tokens without replacement with p ∝ student entropy (the paper's entropy-only).

    Successive draws, no reweighting: biased towards uncertain tokens by design (paper Table 3). Tokens of zero entropy
    come last, in random order. importance_weighted: instead, systematic sampling of the same number of tokens with
    π_t = min(1, c·(h_t + ε)), Σπ = k, and weight (k/m)/π_t, so that the gradient is unbiased for training on all
    tokens (paper A.2/A.3; the scheme is ours). epsilon_nats: ε > 0, so that every token can be drawn.
    """

    importance_weighted: bool = False
    epsilon_nats: PositiveFloat = 0.01

    name: ClassVar[str] = "entropy_sample"
    needs: ClassVar[frozenset[str]] = frozenset({"entropy_N"})

    def choose(self, stats: TokenStats, rollouts: Rollouts, budget_R: Tensor, seed: int) -> Selection:
        """Keep budget_R rows of each rollout, and weight them if importance_weighted."""
        if not self.importance_weighted:
            return super().choose(stats, rollouts, budget_R, seed)
        entropy_N = read_field(stats, "entropy_N", self.name)
        mass_N = (entropy_N.double() + self.epsilon_nats)[rollouts.order_N].cpu()
        draws_N = uniform_draws(rollouts, seed, self.name)[rollouts.order_N].cpu()
        counts, budgets = rollouts.counts_R.tolist(), budget_R.tolist()
        kept, weights = [], []
        for mass_m, draws_m, budget in zip(mass_N.split(counts), draws_N.split(counts), budgets, strict=True):
            pi_m = inclusion_probabilities(mass_m, budget)
            kept.append(systematic_mask(pi_m, budget, float(draws_m[0])))
            weights.append(budget / len(pi_m) / pi_m)
        kept_N = torch.empty_like(rollouts.order_N, dtype=torch.bool)
        weight_N = torch.ones_like(entropy_N, dtype=torch.float32)
        if kept:
            kept_N[rollouts.order_N] = torch.cat(kept).to(kept_N.device)
            weight_N[rollouts.order_N] = torch.cat(weights).to(weight_N)
        return Selection(kept_N, torch.where(kept_N, weight_N, 1.0))

    def score(self, stats: TokenStats, rollouts: Rollouts, seed: int) -> Tensor:
        entropy_N = read_field(stats, "entropy_N", self.name)
        return successive_keys(entropy_N, uniform_draws(rollouts, seed, self.name))


@dataclass(eq=False)
class Entropy(Selector):
    """Keep the tokens of highest student entropy."""

    name: ClassVar[str] = "entropy"
    needs: ClassVar[frozenset[str]] = frozenset({"entropy_N"})

    def score(self, stats: TokenStats, rollouts: Rollouts, seed: int) -> Tensor:
        return read_field(stats, "entropy_N", self.name)


@dataclass(eq=False)
class SoftOr(NormalisingSelector):
    """Keep uncertain tokens and those the models disagree on: highest 1 − (1−ĥ)(1−δ̂).

    Paper v1 Eq. 5, v4 Eq. 7; ĥ is clipped at clip_quantile, so the top 2 % of entropies tie at 1 and among equals the
    earlier position wins. One huge δ shrinks every other δ̂ and turns the ranking into entropy's: see
    divergence_clip_quantile and ranks.
    """

    name: ClassVar[str] = "soft_or"
    needs: ClassVar[frozenset[str]] = frozenset({"entropy_N", "reverse_kl_N"})

    def score(self, stats: TokenStats, rollouts: Rollouts, seed: int) -> Tensor:
        entropy_N = self.normalised("entropy_N", stats, rollouts)
        divergence_N = self.normalised("reverse_kl_N", stats, rollouts)
        # This form keeps its digits if both are small; 1 − (1−ĥ)(1−δ̂) would round such tokens to ties.
        return entropy_N + divergence_N - entropy_N * divergence_N


@dataclass(eq=False)
class SoftOrBottom(SoftOr):
    """Keep the lowest Soft-OR: the solved tokens, as a sanity check (paper Table 6)."""

    name: ClassVar[str] = "soft_or_bottom"

    def score(self, stats: TokenStats, rollouts: Rollouts, seed: int) -> Tensor:
        return -super().score(stats, rollouts, seed)


@dataclass(eq=False)
class Q3(NormalisingSelector):
    """Keep overconfident tokens: highest KL(teacher‖student)·(1−ĥ) (paper Table 4).

    The forward KL is used for ranking only; training uses the loss's own divergence.
    """

    name: ClassVar[str] = "q3"
    needs: ClassVar[frozenset[str]] = frozenset({"entropy_N", "forward_kl_N"})
    normalised_fields: ClassVar[tuple[str, ...]] = ("entropy_N",)

    def score(self, stats: TokenStats, rollouts: Rollouts, seed: int) -> Tensor:
        confidence_N = 1.0 - self.normalised("entropy_N", stats, rollouts)
        return read_field(stats, "forward_kl_N", self.name).double() * confidence_N


@dataclass(eq=False)
class Divergence(Selector):
    """Keep the tokens of highest reverse KL, KL(student‖teacher) (paper v4 Table 8)."""

    name: ClassVar[str] = "divergence"
    needs: ClassVar[frozenset[str]] = frozenset({"reverse_kl_N"})

    def score(self, stats: TokenStats, rollouts: Rollouts, seed: int) -> Tensor:
        return read_field(stats, "reverse_kl_N", self.name)


@dataclass(eq=False)
class Random(Selector):
    """Keep tokens uniformly at random: a baseline that needs no statistics."""

    name: ClassVar[str] = "random"

    def score(self, stats: TokenStats, rollouts: Rollouts, seed: int) -> Tensor:
        return uniform_draws(rollouts, seed, self.name)
