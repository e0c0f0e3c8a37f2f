"""Draws against their exact probabilities. Seeds are fixed: each test gives the same number every time."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tolerance import close, rounding

from opsd.distill import distill_loss
from tip_patch.groups import Rollouts
from tip_patch.sampling import (
    LOG_OF_ZERO,
    inclusion_probabilities,
    successive_keys,
    systematic_mask,
    uniform_draws,
)
from tip_patch.selectors import EntropySample, Random

DRAWS = 20_000
H = [0.05, 0.4, 0.9, 0.2, 1.6, 0.0]
# 99.9 % points of the chi-square distribution, by degrees of freedom
CHI_SQUARE = {4: 18.47, 5: 20.52, 9: 27.88, 19: 43.82}


def draws(make_stats, selector, h, seed=0):
    """Masks [DRAWS, m] of as many rollouts with the same entropies, and their weights."""
    rollout = np.repeat(np.arange(DRAWS), len(h))
    selection = selector(make_stats(rollout=rollout, h=np.tile(h, DRAWS)), seed)
    weight = None if selection.weight_N is None else selection.weight_N.view(DRAWS, len(h)).double().numpy()
    return selection.kept_N.view(DRAWS, len(h)).numpy(), weight


def successive_set_probabilities(mass, k):
    """Exact probability of each k-set under successive draws with p ∝ mass: a sum over the orders of drawing."""
    found = {}
    for order in itertools.permutations([i for i, value in enumerate(mass) if value > 0], k):
        probability, left = 1.0, sum(mass)
        for row in order:
            probability *= mass[row] / left
            left -= mass[row]
        key = tuple(sorted(order))
        found[key] = found.get(key, 0.0) + probability
    return found


def chi_square(kept, probabilities):
    counts = dict.fromkeys(probabilities, 0)
    for row in kept:
        counts[tuple(np.flatnonzero(row).tolist())] += 1  # a set that cannot happen is a KeyError
    return sum((counts[s] - DRAWS * p) ** 2 / (DRAWS * p) for s, p in probabilities.items())


@pytest.mark.parametrize(("k", "freedom"), [(1, 4), (2, 9), (3, 9)])
def test_sets_come_up_as_successive_draws_with_p_proportional_to_entropy(k, freedom, make_stats):
    # six tokens of which the last has no entropy: it is never among the first five
    kept, _ = draws(make_stats, EntropySample(retention=k / 6), H)
    probabilities = successive_set_probabilities(H, k)
    assert len(probabilities) == freedom + 1
    assert chi_square(kept, probabilities) < CHI_SQUARE[freedom]


def test_inclusion_counts_equal_an_independent_simulation(make_stats):
    kept, _ = draws(make_stats, EntropySample(retention=0.5), H)
    rng, mass = np.random.default_rng(1), np.array(H)
    simulated = np.zeros(len(H))
    for _ in range(DRAWS // 4):
        simulated[rng.choice(len(H), 3, replace=False, p=mass / mass.sum())] += 4
    # two binomial counts of one probability, the second from a quarter of the draws: 4 standard errors apart at most
    frequency = simulated / DRAWS
    error = np.sqrt(frequency * (1 - frequency) * 5 / DRAWS)
    assert np.all(np.abs(kept.mean(0) - frequency) <= 4 * error)
    # successive draws do not include in proportion to entropy: 0.9/0.4 = 2.25 is far from the ratio of counts
    assert frequency[2] / frequency[1] < 1.8


def test_random_keeps_all_sets_alike(make_stats):
    kept, _ = draws(make_stats, Random(retention=0.5), H)
    sets = {s: 1 / 20 for s in itertools.combinations(range(6), 3)}
    assert chi_square(kept, sets) < CHI_SQUARE[19]


def test_tokens_without_entropy_come_last_and_in_random_order(make_stats):
    kept, _ = draws(make_stats, EntropySample(retention=0.5), [0.0, 0.7, 0.0, 0.0])
    assert kept[:, 1].all()
    counts = kept[:, [0, 2, 3]].sum(0)
    assert counts.sum() == DRAWS
    assert np.all(np.abs(counts / DRAWS - 1 / 3) < 4 * math.sqrt(2 / 9 / DRAWS))


def test_no_draw_lifts_a_token_without_entropy_over_the_least_entropy_of_fp32():
    least = torch.tensor([torch.finfo(torch.float32).smallest_normal / 2**23, 0.0])
    assert least[0] > 0
    last_before_one = 1 - 2**-53
    # the highest key that 0 can get short of a draw of exactly 0, and the lowest of the least entropy
    zero = successive_keys(least[1:], torch.tensor([2.0**-53], dtype=torch.float64))
    some = successive_keys(least[:1], torch.tensor([last_before_one], dtype=torch.float64))
    assert float(zero) < float(some)
    exact_zero = successive_keys(least, torch.zeros(2, dtype=torch.float64))
    assert torch.isfinite(exact_zero).all() and LOG_OF_ZERO < float(exact_zero[1]) < float(some)


class TestImportanceWeighted:
    MASS = st.lists(st.floats(1e-4, 10.0), min_size=1, max_size=25)

    @pytest.mark.numeric
    @given(mass=MASS, share=st.floats(0.01, 1.0))
    @settings(max_examples=200, deadline=None)
    def test_inclusion_probabilities_are_proportional_up_to_one_and_add_up_to_the_budget(self, mass, share):
        budget = max(1, int(share * len(mass)))
        pi_m = inclusion_probabilities(torch.tensor(mass), budget).numpy()
        close(pi_m.sum(), budget, len(mass), dtype=torch.float64)
        assert pi_m.min() > 0 and pi_m.max() <= 1
        free = pi_m < 1
        if free.any():
            c = pi_m[free] / np.float32(mass)[free]
            close(c, np.full_like(c, c[0]), len(mass), dtype=torch.float64)
            # certain ones are those that c would lift to 1
            assert np.all(c[0] * np.float32(mass)[~free] >= 1 - rounding(len(mass)))

    @given(mass=MASS, share=st.floats(0.01, 1.0), start=st.floats(0.0, 1.0, exclude_max=True))
    @example(mass=[1.0] * 6, share=0.5, start=1.0 - 2**-52)  # 3 − start rounds to 2
    @settings(max_examples=200, deadline=None)
    def test_the_number_kept_is_exact(self, mass, share, start):
        budget = max(1, int(share * len(mass)))
        pi_m = inclusion_probabilities(torch.tensor(mass), budget)
        assert int(systematic_mask(pi_m, budget, start).sum()) == budget

    def test_by_hand(self):
        # budget 2 of masses 6, 1, 1, 2: c = 2/10 would give 1.2 to the first, so it is certain and the rest share 1:
        # 1/4, 1/4, 1/2
        pi_m = inclusion_probabilities(torch.tensor([6.0, 1.0, 1.0, 2.0]), 2)
        assert pi_m.tolist() == pytest.approx([1, 0.25, 0.25, 0.5])
        # laid end to end: 0–0.25, 0.25–0.5, 0.5–1
        for start, second in ((0.0, 1), (0.2, 1), (0.3, 2), (0.6, 3), (0.99, 3)):
            assert systematic_mask(pi_m, 2, start).nonzero().flatten().tolist() == [0, second]

    def test_tokens_are_kept_as_often_as_their_probability_says(self):
        pi_m = inclusion_probabilities(torch.tensor(H) + 0.01, 3)
        starts = (np.arange(4000) + 0.5) / 4000
        often = sum(systematic_mask(pi_m, 3, start).double() for start in starts) / 4000
        np.testing.assert_allclose(often, pi_m, atol=1 / 4000)  # one of the 4000 starts

    @pytest.mark.numeric
    def test_weights_are_the_budgets_share_over_the_probability(self, make_stats):
        selection = EntropySample(retention=0.5, importance_weighted=True)(make_stats(h=H), 3)
        pi_m = inclusion_probabilities(torch.tensor(H) + 0.01, 3)
        kept_N = selection.kept_N
        close(selection.weight_N[kept_N], (3 / 6 / pi_m)[kept_N], 6)
        assert torch.all(selection.weight_N[~kept_N] == 1)

    @pytest.mark.numeric
    @pytest.mark.e2e
    def test_the_gradient_is_unbiased_and_the_unweighted_one_is_not(self, make_stats):
        generator = torch.Generator().manual_seed(0)
        student_ND, teacher_NE = (torch.randn(6, 4, generator=generator) for _ in range(2))
        student_VD, teacher_VE = (torch.randn(9, 4, generator=generator) for _ in range(2))
        student_VD.requires_grad_()

        def gradient(**how):
            result = distill_loss(student_ND, student_VD, teacher_NE, teacher_VE, **how)
            return torch.autograd.grad(result.loss_sum, student_VD)[0].flatten().double().numpy()

        each = np.stack([gradient(kept_N=torch.eye(6, dtype=torch.bool)[n]) for n in range(6)])
        full = each.sum(0) / 6
        weighted = EntropySample(retention=0.5, importance_weighted=True)
        kept, weight = draws(make_stats, weighted, H)
        estimates = (kept * weight) @ each / 3
        error = estimates.std(0) / math.sqrt(DRAWS)
        assert np.all(np.abs(estimates.mean(0) - full) <= 4.5 * error + 1e-9)
        biased = draws(make_stats, EntropySample(retention=0.5), H)[0] @ each / 3
        assert np.any(np.abs(biased.mean(0) - full) > 20 * biased.std(0) / math.sqrt(DRAWS))
        # and the loss does with a selection what was added up here
        mask_N, weight_N = torch.from_numpy(kept[0]), torch.from_numpy(weight[0]).float()
        close(gradient(kept_N=mask_N, weight_N=weight_N) / 3, estimates[0], 4, 9, 6)


def test_streams_of_rules_rollouts_and_seeds_are_apart():
    rollouts = Rollouts.of(torch.tensor([1, 2]).repeat_interleave(500))
    base = uniform_draws(rollouts, 0, "random")
    others = [
        base[500:],
        uniform_draws(rollouts, 1, "random")[:500],
        uniform_draws(rollouts, 0, "entropy_sample")[:500],
    ]
    for other in others:
        correlation = np.corrcoef(base[:500], other)[0, 1]
        assert abs(correlation) < 4 / math.sqrt(500)
