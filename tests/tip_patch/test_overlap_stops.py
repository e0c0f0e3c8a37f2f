"""Where each rule ranks the token that ends a turn, and whether it keeps it, by hand."""

import dataclasses

import pytest
import torch

from opsd.distill.stats import stop_metrics
from opsd.selection import load_selector
from tip_patch.groups import Rollouts
from tip_patch.overlap import ShadowMasks, place_in_rollout


@pytest.fixture
def stats(make_stats):
    """Two rollouts of four tokens and three, each with its end last; the first one's end has the largest δ of its own,
    the second's the smallest h and δ."""
    made = make_stats(
        rollout=[0, 0, 0, 0, 1, 1, 1],
        h=[0.4, 0.3, 0.2, 0.1, 0.9, 0.8, 0.0],
        delta=[0.1, 0.2, 0.3, 9.0, 0.5, 0.6, 0.0],
        forward=[0.1, 0.2, 0.3, 9.0, 0.5, 0.6, 0.0],
    )
    stop_N = torch.tensor([False, False, False, True, False, False, True])
    log_prob_N = torch.tensor([0.1, 0.1, 0.1, 0.8, 0.2, 0.2, 0.5]).log()
    teacher_N = torch.tensor([0.3, 0.3, 0.3, 0.2, 0.0, 0.0, 1.0]).log()
    return dataclasses.replace(made, stop_N=stop_N, stop_log_prob_N=log_prob_N, teacher_stop_log_prob_N=teacher_N)


def test_a_place_is_the_fraction_of_the_rollouts_other_tokens_below(stats):
    places = place_in_rollout(stats.reverse_kl_N, Rollouts.of(stats.rollout_N))
    assert places.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1, 0.5, 1, 0])
    assert place_in_rollout(torch.ones(1), Rollouts.of(torch.zeros(1, dtype=torch.int64))).tolist() == [1]


def test_every_rule_tells_where_it_ranks_the_end_and_whether_it_keeps_it(stats):
    selector = load_selector("divergence", retention=0.5)
    found = ShadowMasks()(stats, selector(stats).kept_N, selector, 0)
    # δ: above all three in the first rollout, above none in the second. h: above none in either.
    assert found["stop/score_percentile"] == 0.5
    assert found["stop/score_percentile_entropy"] == 0.0
    assert found["stop/score_percentile_first_fraction"] == 0.0
    # At two tokens and one, entropy keeps neither end.
    assert found["stop/kept_frac_entropy"] == 0.0
    assert found["stop/kept_frac_q3"] == 0.5
    assert "stop/score_percentile_divergence" not in found
    assert 0 <= found["stop/kept_frac_random"] <= 1


def test_without_a_selector_the_ranks_are_told_and_no_masks(stats):
    found = ShadowMasks()(stats, torch.ones(7, dtype=torch.bool), None, 0)
    assert found["stop/score_percentile_divergence"] == 0.5
    assert not [key for key in found if "jaccard" in key or "kept_frac" in key]
    assert "stop/score_percentile" not in found


def test_a_step_without_ends_tells_nothing_of_them(stats):
    endless = dataclasses.replace(stats, stop_N=torch.zeros(7, dtype=torch.bool))
    selector = load_selector("entropy", retention=0.5)
    found = ShadowMasks()(endless, selector(endless).kept_N, selector, 0)
    assert not [key for key in found if key.startswith("stop/")]
    assert stop_metrics(endless, selector(endless).kept_N) == {}
    assert stop_metrics(dataclasses.replace(stats, stop_N=None), selector(stats).kept_N) == {}


def test_both_models_chances_of_the_end_are_told_at_it_and_before_it(stats):
    found = stop_metrics(stats, torch.tensor([True, True, False, True, False, False, False]))
    expected = {
        "stop/count": 2,
        "stop/kept_frac": 0.5,
        "stop/student_prob": (0.8 + 0.5) / 2,
        "stop/teacher_prob": (0.2 + 1.0) / 2,
        "stop/student_prob_before": (3 * 0.1 + 2 * 0.2) / 5,
        "stop/teacher_prob_before": 3 * 0.3 / 5,
        # ln(0.2/0.8) and ln(1/0.5): torch's median of two is the lower.
        "stop/delta_nats": -1.3862943,
    }
    assert found == pytest.approx(expected, rel=1e-5)
