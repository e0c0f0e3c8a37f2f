"""Rules from other work, by hand."""

import math

import pytest
import torch
from tolerance import close

from opsd.distill import distill_loss
from opsd.selection import Selection
from opsd.utils.errors import UserError
from tip_patch.baselines import IWOPD, AdaptiveKL, FirstFraction, PositionWeighted, Teachability, Verify


class TestAdaptiveKL:
    @pytest.mark.numeric
    def test_weights_by_hand(self, make_stats):
        # |V| = e²: log|V| = 2 up to rounding of |V|, so take |V| = 4 and H_T in units of log 4
        unit = math.log(4)
        stats = make_stats(
            rollout=[0, 0, 0, 1], h=[1.0, 3.0, 9.0, 0.5], teacher=[0.0, unit, float("nan"), unit / 2], vocab=4
        )
        kept_N = torch.tensor([True, True, False, True])
        weight_N = AdaptiveKL().weigh(stats, Selection(kept_N)).weight_N
        # (1 + H_T/log|V|)·h = 1, 6 → mean 3.5; a rollout with one kept token has weight 1
        assert weight_N.tolist() == pytest.approx([1 / 3.5, 6 / 3.5, 1.0, 1.0])

    def test_kept_tokens_without_entropy_weigh_one(self, make_stats):
        stats = make_stats(h=[0.0, 0.0], teacher=[0.3, 0.1], vocab=4)
        assert AdaptiveKL().weigh(stats, Selection(torch.tensor([True, True]))).weight_N.tolist() == [1.0, 1.0]

    @pytest.mark.numeric
    def test_through_the_loss_it_equals_its_weights(self):
        generator = torch.Generator().manual_seed(0)
        student_ND, teacher_NE = (torch.randn(12, 8, generator=generator) for _ in range(2))
        student_VD, teacher_VE = (torch.randn(30, 8, generator=generator) for _ in range(2))
        arguments = (student_ND, student_VD, teacher_NE, teacher_VE)
        selector = AdaptiveKL(retention=0.5)
        result = distill_loss(*arguments, selector=selector, seed=3)
        weight_N = selector.weigh(result.stats, Selection(result.kept_N)).weight_N
        again = distill_loss(*arguments, kept_N=result.kept_N, weight_N=weight_N)
        close(result.loss_sum, again.loss_sum, 8, 30, 12)
        assert float(result.loss_sum) != pytest.approx(float(distill_loss(*arguments, kept_N=result.kept_N).loss_sum))

    def test_without_a_vocabulary_size_it_says_so(self, make_stats):
        with pytest.raises(UserError, match="vocab_size"):
            AdaptiveKL().weigh(make_stats(h=[1.0], teacher=[1.0]), Selection(torch.tensor([True])))


def test_first_fraction_keeps_the_beginnings(make_stats):
    # five tokens of rollout 8 and two of rollout 2, interleaved: ⌊0.6·5⌋ = 3 and ⌊0.6·2⌋ = 1
    stats = make_stats(rollout=[8, 2, 8, 8, 2, 8, 8])
    assert FirstFraction(retention=0.6)(stats).kept_N.tolist() == [True, True, True, True, False, False, False]


@pytest.mark.parametrize(("slope", "expected"), [(1.0, [0.5, 1.0, 1.5]), (-2.0, [2.0, 1.0, 0.0]), (0.0, [1.0] * 3)])
def test_position_weights_run_linearly_with_mean_one(slope, expected, make_stats):
    selection = PositionWeighted(slope=slope)(make_stats(rollout=[0, 0, 0, 4]))
    assert selection.kept_N.all()
    assert selection.weight_N.tolist() == pytest.approx([*expected, 1.0])


def test_verify_keeps_what_the_teacher_ranks_high(make_stats):
    selector = Verify(top_k=2)
    assert selector(make_stats(rank=[0, 1, 2, 30])).kept_N.tolist() == [True, True, False, False]
    assert not selector.fixed_budget and selector.budget(7) == 7


class TestIWOPD:
    @pytest.mark.numeric
    def test_weights_by_hand(self, make_stats):
        # |a| = 1, 2, 1 of rollout 0: 0, 1/4 and 3/4 of Σ|a| lie before a token, w = 1 + ½·(1 − that); rollout 4 agrees
        stats = make_stats(rollout=[0, 4, 0, 4, 0], ratio=[1.0, 0.0, -2.0, 0.0, 1.0], ids=[0] * 5)
        selection = IWOPD()(stats)
        assert selection.kept_N.all()
        assert selection.weight_N.tolist() == pytest.approx([1.5, 1.5, 1.375, 1.5, 1.125])

    @pytest.mark.numeric
    def test_weights_are_the_formula_and_the_first_ones_are_kept(self, random_stats):
        stats = random_stats(200, 6, seed=4)
        selection = IWOPD(retention=0.3, gamma=0.7)(stats)
        for one in stats.rollout_N.unique():
            rows = (stats.rollout_N == one).nonzero().flatten()
            gap = [abs(float(a)) for a in stats.log_ratio_N[rows].double()]
            budget = max(1, int(0.3 * len(rows) + 1e-9))
            expected = [1 + 0.7 * (1 - sum(gap[:t]) / sum(gap)) for t in range(budget)]
            assert selection.weight_N[rows[:budget]].tolist() == pytest.approx(expected)
            assert selection.kept_N[rows].tolist() == [t < budget for t in range(len(rows))]


def test_teachability_by_hand(make_stats):
    # δ̂ = 0.5, 1, 0.25, 0 without a clip; δ̂·C = 0.5, 0.2, 0.25, 0: the most disputed token lies off the student's own
    stats = make_stats(delta=[2.0, 4.0, 1.0, 0.0], mass=[1.0, 0.2, 1.0, 1.0])
    kept_N = Teachability(divergence_clip_quantile=1.0)(stats).kept_N
    assert kept_N.tolist() == [True, False, True, False]
