"""Selection rules from other work, to compare with the paper's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from opsd.config.settings import Bound, Fraction, NonNegativeFloat, PositiveInt
from opsd.selection import Selection, TokenStats
from opsd.utils.errors import UserError
from tip_patch.groups import Rollouts
from tip_patch.selector import NormalisingSelector, Selector, read_field
from tip_patch.selectors import EntropySample


@dataclass(eq=False)
class AdaptiveKL(EntropySample):
    """Entropy sampling with loss weights that grow with teacher entropy (paper v1 Table 8).

    The paper gives no formula; ours is w = (1 + H_T/log|V|)·h, scaled to mean 1 over each rollout's kept tokens (so
    h's own 1/log|V| cancels). A rollout whose kept tokens all have zero entropy gets weights of 1. Unlike
    entropy_sample it takes no importance weights.
    """

    name: ClassVar[str] = "adaptive_kl"
    needs_kept: ClassVar[frozenset[str]] = frozenset({"teacher_entropy_N"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.importance_weighted:
            raise UserError("adaptive_kl: importance_weighted True: it sets its own weights; use entropy_sample")

    def weigh(self, stats: TokenStats, selection: Selection) -> Selection:
        """Set weight_N from both entropies on the kept rows."""
        kept_N = selection.kept_N
        teacher_N = read_field(stats, "teacher_entropy_N", self.name).double()
        if stats.vocab_size is None:
            raise UserError("adaptive_kl scales teacher entropy by log|V|: give TokenStats its vocab_size")
        log_vocab = torch.tensor(float(stats.vocab_size)).log().clamp_min(torch.finfo(torch.float32).tiny)
        raw_N = (1.0 + teacher_N / log_vocab.item()) * read_field(stats, "entropy_N", self.name).double()
        return Selection(kept_N, scale_to_mean_one(torch.where(kept_N, raw_N, 0.0), kept_N, stats.rollout_N))


@dataclass(eq=False)
class FirstFraction(Selector):
    """Keep the first ρ of each rollout, where its context is still close to the teacher's.

    After "On the Position Bias of On-Policy Distillation" (arXiv 2606.22600), whose first 30 % of tokens do about as
    well as all of them.
    """

    name: ClassVar[str] = "first_fraction"

    def score(self, stats: TokenStats, rollouts: Rollouts, seed: int) -> Tensor:
        return -rollouts.position_N()


@dataclass(eq=False)
class PositionWeighted(Selector):
    """Weight the first ρ of each rollout (ρ = 1: all) by position, rising or falling, mean 1.

    After PW-OPSD (arXiv 2605.21606), whose weights increase with the position; the linear form is ours. slope: weights
    run from 1 − slope/2 at the first token to 1 + slope/2 at the last, in [−2, 2]; their mean is 1. A negative slope
    favours early tokens, as arXiv 2606.22600 suggests.
    """

    retention: Fraction = 1.0
    slope: Annotated[float, Bound(lambda slope: -2 <= slope <= 2, "a number in [-2, 2]")] = 1.0

    name: ClassVar[str] = "position_weighted"

    def choose(self, stats: TokenStats, rollouts: Rollouts, budget_R: Tensor, seed: int) -> Selection:
        """Keep the first budget_R rows of each rollout and weight them by their position among these."""
        position_N, budget_N = rollouts.position_N(), budget_R[rollouts.index_N]
        along_N = position_N.double() / (budget_N - 1).clamp_min(1)
        along_N = torch.where(budget_N > 1, along_N, 0.5)
        kept_N = position_N < budget_N
        weight_N = torch.where(kept_N, 1.0 + self.slope * (along_N - 0.5), 1.0)
        return Selection(kept_N, weight_N.float())


@dataclass(eq=False)
class IWOPD(Selector):
    """Weight the first ρ of each rollout (ρ = 1: all) by how close it still is to the teacher.

    After IW-OPD (arXiv 2606.22600): w_t = 1 + γ·(1 − Σ_{i<t}|a_i| / Σ_i|a_i|) over a rollout, with a = log q − log p of
    the sampled token: from 1 + γ at the first token down towards 1. Weights are taken as they are, without a mean of 1.
    The paper keeps all tokens; if fewer are kept, they are the first ones, which weigh most (our reading). If both
    models agree on a whole rollout, all its weights are 1 + γ. gamma: γ ≥ 0, the paper's 0.5.
    """

    retention: Fraction = 1.0
    gamma: NonNegativeFloat = 0.5

    name: ClassVar[str] = "iw_opd"
    needs: ClassVar[frozenset[str]] = frozenset({"log_ratio_N", "token_ids_N"})

    def choose(self, stats: TokenStats, rollouts: Rollouts, budget_R: Tensor, seed: int) -> Selection:
        """Keep the first budget_R rows of each rollout and weight them by the gap accumulated before them."""
        gap_N = read_field(stats, "log_ratio_N", self.name).double().abs()
        total_N = rollouts.sum(gap_N)[rollouts.index_N]
        passed_N = rollouts.before(gap_N) / torch.where(total_N > 0, total_N, 1.0)
        kept_N = rollouts.position_N() < budget_R[rollouts.index_N]
        weight_N = torch.where(kept_N, 1.0 + self.gamma * (1.0 - passed_N.clamp(0.0, 1.0)), 1.0)
        return Selection(kept_N, weight_N.float())


@dataclass(eq=False)
class Teachability(NormalisingSelector):
    """Keep disputed tokens that the teacher settles among the student's candidates.

    After TA-OPD (arXiv 2605.26844): highest δ̂·C, with C the teacher's probability of the student's 16 likeliest tokens.
    Our reading: δ̂ is the exact reverse KL under min-max, clipped at its 95th percentile (divergence_clip_quantile); the
    paper sums over the union of both models' top 16 and scales both factors between their 5th and 95th percentiles.
    C is a probability already and is taken as it is.
    """

    divergence_clip_quantile: Fraction = 0.95

    name: ClassVar[str] = "teachability"
    needs: ClassVar[frozenset[str]] = frozenset({"reverse_kl_N", "teacher_mass_N"})
    normalised_fields: ClassVar[tuple[str, ...]] = ("reverse_kl_N",)

    def score(self, stats: TokenStats, rollouts: Rollouts, seed: int) -> Tensor:
        mass_N = read_field(stats, "teacher_mass_N", self.name).double()
        return self.normalised("reverse_kl_N", stats, rollouts) * mass_N


@dataclass(eq=False)
class Verify(Selector):
    """Keep tokens that the teacher accepts: the student's token is among its k most likely.

    After SelecTKD (arXiv 2510.24021), its greedy top-k variant with rejected tokens masked. How many are kept depends
    on the models, so retention has no effect. top_k: how many of the teacher's tokens pass, at least 1.
    """

    retention: Fraction = 1.0
    top_k: PositiveInt = 5

    name: ClassVar[str] = "verify"
    needs: ClassVar[frozenset[str]] = frozenset({"teacher_rank_N", "token_ids_N"})
    fixed_budget: ClassVar[bool] = False

    def budget(self, tokens: int) -> int:
        """The most that can be kept: all."""
        return tokens

    def __call__(self, stats: TokenStats, seed: int = 0) -> Selection:
        """Keep the accepted rows; a rollout may keep none."""
        return Selection(read_field(stats, "teacher_rank_N", self.name) < self.top_k)


def scale_to_mean_one(raw_N: Tensor, kept_N: Tensor, rollout_N: Tensor) -> Tensor:
    """Weights ∝ raw_N (0 outside kept rows) with mean 1 over each rollout's kept rows, fp32 [N]; 1 if all are 0."""
    rollouts = Rollouts.of(rollout_N)
    kept_R, sum_R = rollouts.sum(kept_N.double()), rollouts.sum(raw_N)
    flat_R = sum_R <= 0
    factor_R = torch.where(flat_R, 0.0, kept_R / torch.where(flat_R, 1.0, sum_R))
    weight_N = raw_N * factor_R[rollouts.index_N]
    return torch.where(flat_R[rollouts.index_N] | ~kept_N, 1.0, weight_N).float()
