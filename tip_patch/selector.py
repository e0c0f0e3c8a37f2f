"""What all selectors share: options, budgets, and scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from opsd.config.settings import Bound, Fraction, FractionFromZero
from opsd.selection import Selection, TokenStats
from opsd.utils.errors import UserError
from tip_patch.groups import Rollouts
from tip_patch.normalise import SCOPES, MinMax, Normaliser, Ranks, Reduce
from tip_patch.options import convert_options

Scope = Annotated[str, Bound(lambda scope: scope in SCOPES, f"one of: {', '.join(SCOPES)}")]


def read_field(stats: TokenStats, field: str, reader: str) -> Tensor:
    """A statistic [N]. Raises UserError if it was not computed."""
    values_N = getattr(stats, field)
    if values_N is None:
        raise UserError(
            f"{reader} reads {field}, which was not computed: name it in the rule's `needs`, or in token_stats(needs=…)"
        )
    return values_N


@dataclass(eq=False)
class Selector:
    """A rule with options; subclasses say how rows are chosen. Dataclass fields are the options.

    retention: fraction ρ of each rollout's tokens that is kept, in (0, 1]. normalise_over: tokens that set min and max
    (see `normalise.py`); rules that normalise nothing report "micro_batch" whatever was set, so that a trainer runs
    no scoring pass for them. clip_quantile: entropy is clipped there before min-max, in (0, 1]; 1 is off.
    Errors: UserError for an option of the wrong type or out of range.
    """

    retention: Fraction = 0.5
    normalise_over: Scope = "micro_batch"
    clip_quantile: Fraction = 0.98

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    needs_kept: ClassVar[frozenset[str]] = frozenset()
    fixed_budget: ClassVar[bool] = True
    normalises: ClassVar[bool] = False

    def __post_init__(self) -> None:
        convert_options(self, self.name)
        if not self.normalises:
            self.normalise_over = "micro_batch"

    def budget(self, tokens: int) -> int:
        """⌊ρm⌋, at least 1: how many of a rollout's `tokens` student tokens are kept (paper Eq. 6/8)."""
        return min(tokens, max(1, int(self.retention * tokens + 1e-9)))

    def budgets(self, rollouts: Rollouts) -> Tensor:
        """`budget` of each rollout, int64 [R]."""
        return (self.retention * rollouts.counts_R.double() + 1e-9).floor().long().clamp_min(1)

    def __call__(self, stats: TokenStats, seed: int = 0) -> Selection:
        """Keep `budget` rows of each rollout; draws depend only on seed, rollout id and rule."""
        rollouts = Rollouts.of(stats.rollout_N)
        return self.choose(stats, rollouts, self.budgets(rollouts), seed)

    def choose(self, stats: TokenStats, rollouts: Rollouts, budget_R: Tensor, seed: int) -> Selection:
        """Keep budget_R rows of each rollout: here the highest `score`, ties to the earlier position.

        Errors: UserError for a score that is NaN, or of another shape.
        """
        score_N, tokens = self.score(stats, rollouts, seed), stats.rollout_N.numel()
        if score_N.shape != (tokens,):
            raise UserError(f"selector {self.name}: score returned shape {list(score_N.shape)} for {tokens} tokens")
        # Statistics that are not finite are not the rule's fault: the trainer skips such a step.
        read = [value for name in self.needs if isinstance(value := getattr(stats, name), Tensor)]
        finite = not self.normalises and all(bool(value.isfinite().all()) for value in read)
        if finite and (wrong := int(score_N.isnan().sum())):
            raise UserError(
                f"selector {self.name}: score is NaN for {wrong} of {tokens} tokens; is something divided by 0?"
            )
        return Selection(rollouts.top(score_N, budget_R))

    def score(self, stats: TokenStats, rollouts: Rollouts, seed: int) -> Tensor:
        """What rows are ranked by, highest first [N]; a rule that does not rank overrides `choose` instead.

        Errors: UserError for a rule that has neither.
        """
        raise UserError(f"selector {type(self).__name__} has neither score nor choose: write one of them")

    def prepare(self, all_stats: TokenStats) -> None:
        """Learn the scale of the whole step (scope "batch")."""

    def end_step(self, reduce: Reduce) -> None:
        """Learn from the step that ends (scope "running"). reduce: sums a CPU tensor over ranks."""

    def state_dict(self) -> dict[str, Any]:
        """What scope "running" remembers, as JSON values; else empty."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


@dataclass(eq=False)
class NormalisingSelector(Selector):
    """A selector whose score is computed from normalised statistics.

    divergence_clip_quantile: δ is clipped there before min-max; 1.0 (off) is the paper's rule. ranks: normalise by
    rank instead of min-max (the clips then have no effect). running_decay: under scope "running" a step's tokens have
    weight decay^age.
    """

    divergence_clip_quantile: Fraction = 1.0
    ranks: bool = False
    running_decay: FractionFromZero = 0.9

    normalises: ClassVar[bool] = True
    normalised_fields: ClassVar[tuple[str, ...]] = ("entropy_N", "reverse_kl_N")

    def __post_init__(self) -> None:
        super().__post_init__()
        clips = {"entropy_N": self.clip_quantile, "reverse_kl_N": self.divergence_clip_quantile}
        self._normalisers = {
            field: Normaliser(Ranks() if self.ranks else MinMax(clips[field]), self.normalise_over, self.running_decay)
            for field in self.normalised_fields
        }

    def normalised(self, field: str, stats: TokenStats, rollouts: Rollouts) -> Tensor:
        """A statistic scaled to [0, 1] (ĥ or δ̂), fp64 [N]."""
        return self._normalisers[field](read_field(stats, field, self.name), rollouts)

    def prepare(self, all_stats: TokenStats) -> None:
        for field, normaliser in self._normalisers.items():
            normaliser.prepare(read_field(all_stats, field, self.name))

    def end_step(self, reduce: Reduce) -> None:
        if self.normalise_over != "running":
            return
        counts = reduce(torch.stack([normaliser.seen for normaliser in self._normalisers.values()])).cpu()
        for normaliser, of_field in zip(self._normalisers.values(), counts, strict=True):
            normaliser.end_step(of_field)

    def state_dict(self) -> dict[str, Any]:
        if self.normalise_over != "running":
            return {}
        return {field: normaliser.state_dict() for field, normaliser in self._normalisers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.normalise_over != "running":
            return
        if set(state) != set(self._normalisers):
            known = ", ".join(self._normalisers)
            raise UserError(
                f"{self.name}: saved state has {sorted(state)} instead of {known}: resume with its settings"
            )
        for field, normaliser in self._normalisers.items():
            normaliser.load_state_dict(state[field])
