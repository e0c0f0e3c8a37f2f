"""A histogram of nats that can be summed over ranks and saved in a checkpoint: the memory of scope "running"."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opsd.utils.errors import UserError

# Edges 10^-8 … 10^3 nats, 1.25 % apart; values below and above them are counted in the end bins.
DECADES = (-8.0, 3.0)
BINS = 2050
# A bin that holds less than this many (decayed) tokens is forgotten, so that an old outlier does not set the range.
FORGOTTEN_TOKENS = 0.5


def _edges() -> Tensor:
    """The BINS + 1 edges, fp64 nats, ascending; the first is 0."""
    inner = torch.logspace(*DECADES, BINS - 1, dtype=torch.float64)
    step = 10 ** ((DECADES[1] - DECADES[0]) / (BINS - 2))
    return torch.cat([torch.zeros(1, dtype=torch.float64), inner, inner[-1:] * step])


EDGES = _edges()


def count_bins(values_M: Tensor) -> Tensor:
    """How many of the values (nats, ≥ 0) fall in each bin: int64 [BINS] on the CPU."""
    inner = EDGES[1:-1].to(values_M.device)
    bin_M = torch.bucketize(values_M.double(), inner, right=True)
    return torch.bincount(bin_M, minlength=BINS).cpu()


class Histogram:
    """Counts that decay: a step's tokens have weight decay^age."""

    def __init__(self, decay: float) -> None:
        self._decay, self._counts = decay, torch.zeros(BINS, dtype=torch.float64)

    @property
    def empty(self) -> bool:
        return not bool(self._counts.any())

    def add(self, counts: Tensor) -> None:
        """Decay the counts by one step and add that step's counts [BINS]."""
        aged = self._counts * self._decay
        self._counts = torch.where(aged < FORGOTTEN_TOKENS, 0.0, aged) + counts

    def quantile(self, quantile: float) -> Tensor:
        """The value in nats, fp64 [], below which that fraction lies; linear within a bin. Needs at least one token."""
        filled = self._counts.nonzero().squeeze(-1)
        mass = self._counts[filled].cumsum(0)
        target = quantile * mass[-1]
        place = int(torch.searchsorted(mass, target).clamp_max(len(filled) - 1))
        bin_ = filled[place]
        inside = 1.0 - (mass[place] - target) / self._counts[bin_]
        return torch.lerp(EDGES[bin_], EDGES[bin_ + 1], inside.clamp(0.0, 1.0))

    def below(self, values_N: Tensor) -> Tensor:
        """The fraction of tokens that lie below each value, fp64 [N]; linear within a bin. Needs at least one token."""
        edges, counts = EDGES.to(values_N.device), self._counts.to(values_N.device)
        values_N = values_N.double()
        bin_N = torch.bucketize(values_N, edges[1:-1], right=True)
        inside_N = ((values_N - edges[bin_N]) / (edges[bin_N + 1] - edges[bin_N])).clamp(0.0, 1.0)
        before_N = (counts.cumsum(0) - counts)[bin_N]
        return (before_N + inside_N * counts[bin_N]) / counts.sum()

    def state_dict(self) -> dict[str, Any]:
        """The filled bins and their counts, as JSON values."""
        filled = self._counts.nonzero().squeeze(-1)
        return {"bins": filled.tolist(), "counts": self._counts[filled].tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError for a state that does not fit this version's bins."""
        bins = torch.tensor(state["bins"], dtype=torch.int64)
        if bins.numel() and not 0 <= int(bins.min()) <= int(bins.max()) < BINS:
            raise UserError(f"a saved histogram has bin {int(bins.max())}, this version {BINS}: start a new run")
        self._counts = torch.zeros(BINS, dtype=torch.float64)
        self._counts[bins] = torch.tensor(state["counts"], dtype=torch.float64)
