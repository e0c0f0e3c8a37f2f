"""Random choices drawn per rollout: the same for any layout, order, chunk size or number of ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from opsd.utils.seeding import derive_seed
from tip_patch.groups import Rollouts

# Below log of the smallest fp32 (−103.3) by more than the range of −log E for fp64 draws (−3.7 … 36.8).
LOG_OF_ZERO = -1000.0


def uniform_draws(rollouts: Rollouts, seed: int, rule: str) -> Tensor:
    """One number in [0, 1) for each row, fp64 [N] on the rows' device, drawn on the CPU.

    Each rollout has its own random stream, seeded by (seed, rollout id, rule) and read in position order.
    """
    if not rollouts.order_N.numel():
        return torch.zeros(0, dtype=torch.float64, device=rollouts.order_N.device)
    parts = [
        torch.rand(count, dtype=torch.float64, generator=_stream(seed, rollout, rule))
        for rollout, count in zip(rollouts.ids_R.tolist(), rollouts.counts_R.tolist(), strict=True)
    ]
    grouped_N = torch.cat(parts).to(rollouts.order_N.device)
    draws_N = torch.empty_like(grouped_N)
    draws_N[rollouts.order_N] = grouped_N
    return draws_N


def successive_keys(mass_N: Tensor, draws_N: Tensor) -> Tensor:
    """Keys whose k highest are k successive draws without replacement with p ∝ mass (paper, Table 3), fp64 [N].

    With E exponential, mass/E ranks rows as an exponential race does: the first to arrive wins with probability
    ∝ mass, and so on among those left. Rows of mass 0 come after all others, in random order: what p ∝ mass + ε
    does as ε → 0.
    """
    log_mass_N = torch.where(mass_N > 0, mass_N.double().log(), LOG_OF_ZERO)
    return log_mass_N - (-torch.log1p(-draws_N)).log().clamp_min(-700.0)


def inclusion_probabilities(mass_m: Tensor, budget: int) -> Tensor:
    """π = min(1, c·mass) with Σπ = budget, fp64 [m]; mass is positive, 1 ≤ budget ≤ m (paper A.2, our scheme)."""
    sorted_m, order_m = mass_m.double().sort(descending=True, stable=True)
    # rest[j]: mass of all but the j highest. With j of them certain, c = (budget − j)/rest[j].
    rest_m = sorted_m.flip(0).cumsum(0).flip(0)
    left_k = budget - torch.arange(budget, dtype=torch.float64)
    fits_k = left_k * sorted_m[:budget] < (1.0 - 1e-9) * rest_m[:budget]
    certain = int(fits_k.long().argmax()) if bool(fits_k.any()) else budget
    pi_m = torch.ones_like(sorted_m)
    if certain < budget:
        pi_m[certain:] = (budget - certain) / rest_m[certain] * sorted_m[certain:]
    else:
        pi_m[certain:] = 0.0
    return torch.empty_like(pi_m).scatter_(0, order_m, pi_m)


def systematic_mask(pi_m: Tensor, budget: int, start: float) -> Tensor:
    """Bool [m]: exactly Σπ = budget rows, each kept with probability π, for `start` uniform in [0, 1).

    Rows are laid end to end on a line, each as long as its π; the kept ones contain start, start + 1, …
    """
    certain_m = pi_m >= 1.0
    free = budget - int(certain_m.sum())
    ends_m = torch.where(certain_m, 0.0, pi_m).cumsum(0)
    # Rounding of the sum must not lose or add a row.
    ends_m = torch.where(ends_m > free - 1e-9, float(free), ends_m)
    # How many of start, start + 1, … lie below each end; ends_m - start would round, and could lose the last one.
    ticks_m = ends_m.floor() + (ends_m.frac() > start)
    hit_m = torch.diff(ticks_m, prepend=torch.zeros(1, dtype=torch.float64)) > 0
    return certain_m | hit_m


def _stream(seed: int, rollout: int, rule: str) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, rollout, rule))
