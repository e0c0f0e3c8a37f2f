"""Order statistics by rollout against numpy, one rollout at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import close

from tip_patch.groups import Rollouts, quantile

# Few distinct values, so that ties are the rule.
ROWS = st.lists(st.tuples(st.integers(-2, 3), st.integers(0, 4)), min_size=1, max_size=40)


def split(rows: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([row[0] for row in rows]), torch.tensor([row[1] / 4 for row in rows])


@given(ROWS, st.integers(1, 6))
@settings(max_examples=150, deadline=None)
def test_top_keeps_the_highest_and_among_equals_the_earliest(rows, budget):
    rollout_N, score_N = split(rows)
    rollouts = Rollouts.of(rollout_N)
    kept_N = rollouts.top(score_N, torch.full_like(rollouts.counts_R, budget))
    for one in rollout_N.unique():
        mine = [n for n in range(len(rows)) if rollout_N[n] == one]
        best = sorted(mine, key=lambda n: (-score_N[n].item(), n))[:budget]
        assert [n for n in mine if kept_N[n]] == sorted(best)


@pytest.mark.numeric
@given(ROWS, st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_quantile_of_each_rollout_is_numpys(rows, q):
    rollout_N, values_N = split(rows)
    found_R = Rollouts.of(rollout_N).quantile(values_N, q)
    expected_R = [np.quantile(values_N[rollout_N == one].double().numpy(), q) for one in rollout_N.unique()]
    exact = {"dtype": torch.float64, "size": 1.0, "cancels": True}
    close(found_R, expected_R, 1, **exact)
    close(quantile(values_N, q), np.quantile(values_N.double().numpy(), q), 1, **exact)


@given(ROWS)
@settings(max_examples=100, deadline=None)
def test_smaller_counts_strictly_smaller_values_of_the_same_rollout(rows):
    rollout_N, values_N = split(rows)
    smaller_N = Rollouts.of(rollout_N).smaller(values_N)
    for n in range(len(rows)):
        assert smaller_N[n] == ((rollout_N == rollout_N[n]) & (values_N < values_N[n])).sum()


def test_positions_count_within_interleaved_rollouts():
    # rollouts 9, 4, 9, 9, 4: the first, second and third token of 9 stand in rows 0, 2, 3
    assert Rollouts.of(torch.tensor([9, 4, 9, 9, 4])).position_N().tolist() == [0, 0, 1, 2, 1]


@pytest.mark.numeric
@pytest.mark.e2e
def test_quantile_works_beyond_two_to_the_24():
    # 2^24 + 3 values 0, 1, 2, … in shuffled order; their 0.98-quantile is 0.98·(2^24 + 2) by linear interpolation.
    # fp32 holds the integers up to 2^24 only, so the values are halves of even numbers: 0, 0, 2, 2, 4, 4, …
    count = 2**24 + 3
    values_M = (torch.arange(count) // 2 * 2).float()
    values_M = torch.cat([values_M[1::2], values_M[0::2]])
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(values_M, 0.98)
    place = 0.98 * (count - 1)
    low, high = int(place) // 2 * 2, (int(place) + 1) // 2 * 2
    close(quantile(values_M, 0.98), low + (place - int(place)) * (high - low), 1, dtype=torch.float64)
