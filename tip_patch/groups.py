"""Rows grouped by rollout: per-rollout order statistics without a loop over rollouts.

Rows of one rollout are in the order of their positions; rollouts may come in any order and even interleave.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rollouts:
    """Which rows belong together.

    ids_R: the rollouts' ids, ascending. index_N: each row's place in ids_R. counts_R: rows of each.
    order_N: row numbers, rollout by rollout, each in position order. starts_R: where a rollout begins in order_N.
    """

    ids_R: Tensor
    index_N: Tensor
    counts_R: Tensor
    order_N: Tensor
    starts_R: Tensor

    @classmethod
    def of(cls, rollout_N: Tensor) -> Rollouts:
        """Group rows by their rollout's id."""
        ids_R, index_N, counts_R = torch.unique(rollout_N, return_inverse=True, return_counts=True)
        order_N = torch.argsort(index_N, stable=True)
        return cls(ids_R, index_N, counts_R, order_N, counts_R.cumsum(0) - counts_R)

    def position_N(self) -> Tensor:
        """Each row's position in its rollout, counted from 0 over student tokens."""
        return self._scatter(self._steps())

    def top(self, score_N: Tensor, budget_R: Tensor) -> Tensor:
        """Bool [N]: the budget_R highest scores of each rollout; ties go to the earlier position."""
        by_score_N = torch.argsort(score_N, descending=True, stable=True)
        grouped_N = by_score_N[torch.argsort(self.index_N[by_score_N], stable=True)]
        kept_N = torch.empty_like(grouped_N, dtype=torch.bool)
        kept_N[grouped_N] = self._steps() < budget_R[self.index_N[grouped_N]]
        return kept_N

    def sort(self, values_N: Tensor) -> tuple[Tensor, Tensor]:
        """Values ascending within each rollout, rollout by rollout, and the rows they came from."""
        by_value_N = torch.argsort(values_N, stable=True)
        grouped_N = by_value_N[torch.argsort(self.index_N[by_value_N], stable=True)]
        return values_N[grouped_N], grouped_N

    def sum(self, values_N: Tensor) -> Tensor:
        """Σ over each rollout's rows [R]."""
        zeros_R = torch.zeros(self.ids_R.shape[0], dtype=values_N.dtype, device=values_N.device)
        return zeros_R.index_add(0, self.index_N, values_N)

    def before(self, values_N: Tensor) -> Tensor:
        """Σ over the rows of its own rollout that come before each row [N]."""
        grouped_N = values_N[self.order_N]
        running_N = grouped_N.cumsum(0) - grouped_N
        first_R = running_N[self.starts_R]
        return self._scatter(running_N - torch.repeat_interleave(first_R, self.counts_R))

    def quantile(self, values_N: Tensor, quantile: float) -> Tensor:
        """Quantile of each rollout's values [R], interpolated linearly; fp64."""
        sorted_N, _ = self.sort(values_N.double())
        place_R = quantile * (self.counts_R - 1).double()
        below_R = place_R.floor().long()
        above_R = torch.minimum(below_R + 1, self.counts_R - 1)
        low_R, high_R = sorted_N[self.starts_R + below_R], sorted_N[self.starts_R + above_R]
        return low_R + (place_R - below_R) * (high_R - low_R)

    def smaller(self, values_N: Tensor) -> Tensor:
        """How many values of its own rollout are strictly smaller than each row's [N]."""
        sorted_N, rows_N = self.sort(values_N)
        owner_N = self.index_N[rows_N]
        place_N = torch.arange(rows_N.shape[0], device=rows_N.device)
        new_N = torch.ones_like(place_N, dtype=torch.bool)
        new_N[1:] = (sorted_N[1:] != sorted_N[:-1]) | (owner_N[1:] != owner_N[:-1])
        first_N = torch.cummax(torch.where(new_N, place_N, 0), 0).values
        smaller_N = torch.empty_like(place_N)
        smaller_N[rows_N] = first_N - self.starts_R[owner_N]
        return smaller_N

    def _steps(self) -> Tensor:
        """0, 1, 2, … within each rollout, rollout by rollout [N]."""
        place_N = torch.arange(self.order_N.shape[0], device=self.order_N.device)
        return place_N - torch.repeat_interleave(self.starts_R, self.counts_R)

    def _scatter(self, grouped_N: Tensor) -> Tensor:
        """Values in rollout-by-rollout order, put back in row order."""
        rows_N = torch.empty_like(grouped_N)
        rows_N[self.order_N] = grouped_N
        return rows_N


def quantile(values_M: Tensor, quantile: float) -> Tensor:
    """One quantile of many values, interpolated linearly, fp64 []; `torch.quantile` takes at most 2^24.

    values_M holds at least one value.
    """
    count = values_M.shape[0]
    place = quantile * (count - 1)
    below = int(place)
    low = values_M.kthvalue(below + 1).values.double()
    if place == below:
        return low
    high = values_M.kthvalue(below + 2).values.double()
    return low + (place - below) * (high - low)
