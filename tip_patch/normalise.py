"""Statistics in nats to scores in [0, 1]: min-max with a clip, or ranks, over a chosen set of tokens.

Both scales are fitted on one of four scopes: the current micro-batch, each rollout, the whole step (`prepare`), or
earlier steps (histograms). A constant statistic normalises to 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opsd.utils.errors import UserError
from tip_patch.groups import Rollouts, quantile
from tip_patch.histogram import Histogram, count_bins

SCOPES = ("micro_batch", "rollout", "batch", "running")
Scale = Callable[[Tensor], Tensor]
Reduce = Callable[[Tensor], Tensor]


def min_max(values_N: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(value − low)/(high − low) clamped to [0, 1], fp64 [N]; 0 if high = low. low, high: fp64 [] or [N]."""
    width = high - low
    scaled_N = (values_N.double() - low) / torch.where(width > 0, width, 1.0)
    return torch.where(width > 0, scaled_N.clamp(0.0, 1.0), 0.0)


class MinMax:
    """Clip at a quantile, then min-max (paper v4: the clip on entropy is the 98th percentile; 1.0 is plain)."""

    def __init__(self, clip_quantile: float) -> None:
        self._clip_quantile = clip_quantile

    def fit(self, values_M: Tensor) -> Scale:
        """The scale of these values (at least one)."""
        low, high = values_M.min().double(), quantile(values_M, self._clip_quantile)
        return lambda values_N: min_max(values_N, low.to(values_N.device), high.to(values_N.device))

    def per_rollout(self, values_N: Tensor, rollouts: Rollouts) -> Tensor:
        """Each rollout on its own scale, fp64 [N]."""
        low_R, high_R = rollouts.quantile(values_N, 0.0), rollouts.quantile(values_N, self._clip_quantile)
        return min_max(values_N, low_R[rollouts.index_N], high_R[rollouts.index_N])

    def of_history(self, history: Histogram) -> Scale:
        """The scale of what a histogram remembers."""
        low, high = history.quantile(0.0), history.quantile(self._clip_quantile)
        return lambda values_N: min_max(values_N, low.to(values_N.device), high.to(values_N.device))


class Ranks:
    """The fraction of the other tokens that are strictly smaller: outliers count like any other highest value."""

    def fit(self, values_M: Tensor) -> Scale:
        """The scale of these values (at least one)."""
        sorted_M = values_M.sort().values
        others = max(sorted_M.shape[0] - 1, 1)
        return lambda values_N: torch.searchsorted(sorted_M.to(values_N.device), values_N).double() / others

    def per_rollout(self, values_N: Tensor, rollouts: Rollouts) -> Tensor:
        """Ranks within each rollout, fp64 [N]."""
        others_R = (rollouts.counts_R - 1).clamp_min(1).double()
        return rollouts.smaller(values_N).double() / others_R[rollouts.index_N]

    def of_history(self, history: Histogram) -> Scale:
        """Ranks among the tokens that a histogram remembers."""
        return history.below


class Normaliser:
    """One statistic under one scope.

    normalise_over: one of SCOPES. "batch" is fitted by `prepare`. "running" is fitted by `end_step` on what `__call__`
    has seen since the last `end_step`, so it is constant within a step; before the first one it acts as "rollout".
    """

    def __init__(self, method: MinMax | Ranks, normalise_over: str, decay: float) -> None:
        self._method, self._scope = method, normalise_over
        self._history, self._seen = Histogram(decay), self._nothing_seen()
        self._scale: Scale | None = None

    def prepare(self, values_M: Tensor) -> None:
        """Fit the scope "batch" on the whole step's tokens (all micro-batches, all ranks)."""
        if self._scope == "batch":
            self._scale = self._method.fit(values_M) if values_M.numel() else torch.Tensor.double

    def __call__(self, values_N: Tensor, rollouts: Rollouts) -> Tensor:
        """The normalised statistic, fp64 [N] in [0, 1]. Raises UserError under "batch" without `prepare`."""
        if self._scope == "running":
            self._seen += count_bins(values_N)
        if not values_N.numel():
            return values_N.double()
        if self._scope == "micro_batch":
            return self._method.fit(values_N)(values_N)
        if self._scope == "rollout" or (self._scope == "running" and self._scale is None):
            return self._method.per_rollout(values_N, rollouts)
        if self._scale is None:
            raise UserError(
                'normalise_over "batch" before prepare: call selector.prepare(statistics of the whole step) once a '
                "step, or normalise over micro_batch or rollout"
            )
        return self._scale(values_N)

    @property
    def seen(self) -> Tensor:
        """This step's tokens by bin, on this rank: int64 [BINS]."""
        return self._seen

    def end_step(self, counts: Tensor) -> None:
        """Learn from a step's tokens by bin, summed over ranks [BINS]."""
        self._history.add(counts)
        self._seen = self._nothing_seen()
        self._refit()

    def state_dict(self) -> dict[str, Any]:
        """What scope "running" remembers of past steps."""
        return self._history.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._history.load_state_dict(state)
        self._seen = self._nothing_seen()
        self._refit()

    def _refit(self) -> None:
        self._scale = None if self._history.empty else self._method.of_history(self._history)

    @staticmethod
    def _nothing_seen() -> Tensor:
        return count_bins(torch.zeros(0))
