"""The paper's claims about rules, as tests: what entropy cannot see, and what Soft-OR can and cannot."""

import numpy as np
import pytest
import torch
from tolerance import close

from tip_patch.groups import Rollouts
from tip_patch.overlap import jaccard
from tip_patch.selectors import Q3, Entropy, SoftOr

EPSILON = 1e-4
# One token of each quadrant, and the two that span the ranges: h 0…1, δ 0…2.
QUADRANTS = {"q1": (0.8, 1.6), "q2": (0.8, EPSILON), "q3": (EPSILON, 1.6), "q4": (EPSILON, EPSILON)}
H = [value[0] for value in QUADRANTS.values()] + [0.0, 1.0]
DELTA = [value[1] for value in QUADRANTS.values()] + [0.0, 2.0]


def soft_or_scores(stats, **options):
    return SoftOr(**options).score(stats, Rollouts.of(stats.rollout_N), 0)


@pytest.mark.numeric
@pytest.mark.parametrize("f", [lambda h: h, lambda h: h**2, np.sqrt, np.tanh, lambda h: np.maximum(h - 0.1, 0)])
def test_any_function_of_entropy_alone_gives_q3_nothing_while_soft_or_gives_it_its_divergence(f, make_stats):
    scores = f(np.array(H))
    # continuous at 0 with f(0) = 0: Q3 and Q4 look alike and near 0, whatever their divergence
    assert scores[2] == scores[3] <= 0.011
    soft = soft_or_scores(make_stats(h=H, delta=DELTA), clip_quantile=1.0)
    # δ̂ = 1.6/2 = 0.8; with ĥ = 1e-4: 0.8 + 1e-4·0.2
    close(soft[2], 0.8 + EPSILON * 0.2, 1)


@pytest.mark.numeric
def test_q4_stays_near_zero_under_both(make_stats):
    soft = soft_or_scores(make_stats(h=H, delta=DELTA), clip_quantile=1.0)
    # ĥ = 1e-4, δ̂ = 0.5e-4: their sum less their product
    close(soft[3], 1.5e-4 - 0.5e-8, 1)


def test_entropy_ranking_misses_q3_and_soft_or_and_q3_do_not(make_stats):
    stats = make_stats(h=H[:4], delta=DELTA[:4], forward=DELTA[:4])
    # half of Q1, Q2, Q3, Q4
    assert Entropy(retention=0.5)(stats).kept_N.tolist() == [True, True, False, False]
    assert SoftOr(retention=0.75)(stats).kept_N.tolist() == [True, True, True, False]
    assert Q3(retention=0.25)(stats).kept_N.tolist() == [False, False, True, False]


def test_without_divergence_and_clip_soft_or_is_entropy_ranking(random_stats, make_stats):
    stats = random_stats(300, 5, seed=0)
    flat = make_stats(rollout=stats.rollout_N, h=stats.entropy_N, delta=torch.full((300,), 0.3))
    assert torch.equal(SoftOr(clip_quantile=1.0)(flat).kept_N, Entropy()(flat).kept_N)


def test_under_the_clip_the_highest_entropies_tie_and_position_decides(make_stats):
    # the 0.75-quantile of 1, 2, 3, 4, 5 is 4: the last two tie at ĥ = 1
    stats = make_stats(h=[1.0, 2.0, 3.0, 4.0, 5.0], delta=[0.0] * 5)
    assert SoftOr(retention=0.2, clip_quantile=0.75)(stats).kept_N.tolist() == [False, False, False, True, False]
    assert Entropy(retention=0.2)(stats).kept_N.tolist() == [False, False, False, False, True]


def test_soft_or_treats_both_axes_alike_and_stays_in_the_unit_interval(random_stats, make_stats):
    stats = random_stats(200, 1, seed=2)
    scores = soft_or_scores(stats, clip_quantile=1.0)
    swapped = soft_or_scores(make_stats(h=stats.reverse_kl_N, delta=stats.entropy_N), clip_quantile=1.0)
    assert torch.equal(scores, swapped)
    assert float(scores.min()) >= 0.0 and float(scores.max()) <= 1.0


class TestOutlier:
    """The known weakness: one δ far above all others sends every other δ̂ to 0."""

    @pytest.fixture
    def overlap(self, make_stats):
        rng = np.random.default_rng(0)
        h, delta = rng.gamma(0.4, 1.0, 2000), rng.gamma(0.4, 1.0, 2000)

        def measure(outlier: float, **options) -> float:
            stats = make_stats(h=h, delta=[outlier, *delta[1:]])
            return jaccard(SoftOr(clip_quantile=1.0, **options)(stats).kept_N, Entropy()(stats).kept_N)

        return measure

    def test_soft_or_becomes_entropy_as_the_outlier_grows(self, overlap):
        found = [overlap(outlier) for outlier in (5.0, 50.0, 500.0, 5e6)]
        assert found == sorted(found)
        assert found[0] < 0.75
        # all but the outlier itself, which takes one place: 999/1001
        assert found[-1] == pytest.approx(999 / 1001, abs=0.002)  # one token of 1000, both ways

    def test_the_clip_on_divergence_and_ranks_bring_it_back(self, overlap):
        # five tokens of 1000: what the outlier above the clip moves the quantile by
        assert overlap(5e6, divergence_clip_quantile=0.99) == pytest.approx(
            overlap(5.0, divergence_clip_quantile=0.99), abs=0.005
        )
        # five tokens of 1000: what the outlier above the clip moves the quantile by
        assert overlap(5e6, divergence_clip_quantile=0.99) < 0.75
        assert overlap(5e6, ranks=True) == overlap(50.0, ranks=True) < 0.75
