"""Quadrants by hand, and the overlap of masks."""

import math

import pytest
import torch

from opsd.selection import load_selector, load_telemetry
from opsd.utils.errors import UserError
from tip_patch.overlap import RULES, ShadowMasks, jaccard
from tip_patch.quadrants import QuadrantTelemetry

# Q4, Q2, Q3, Q1, Q4 under a split at h = 0.5 (the median) and δ = 0.5 (the mean of 0, 0, 1, 1.5, 0)
H, DELTA, GRAD = [0.1, 0.9, 0.2, 0.7, 0.5], [0.0, 0.0, 1.0, 1.5, 0.0], [0.5, 0.5, 1.0, 1.0, 1.0]
KEPT = torch.tensor([False, True, True, True, False])


@pytest.fixture
def stats(make_stats):
    return make_stats(h=H, delta=DELTA, grad=GRAD, teacher=[0.0, 0.0, math.log(2), 0.0, 1.0], forward=DELTA)


def test_shares_masses_and_thresholds(stats):
    numbers = QuadrantTelemetry("median", "mean")(stats, KEPT, None, 0)
    assert [numbers[f"quadrant/q{q}_frac"] for q in (1, 2, 3, 4)] == pytest.approx([0.2, 0.2, 0.2, 0.4])
    # Σδ = 2.5: 1.5 of it in Q1, 1 in Q3
    assert [numbers[f"quadrant/q{q}_loss_frac"] for q in (1, 2, 3, 4)] == pytest.approx([0.6, 0, 0.4, 0])
    # Σ‖g‖ = 4: 1, 0.5, 1, 1.5
    assert [numbers[f"quadrant/q{q}_grad_frac"] for q in (1, 2, 3, 4)] == pytest.approx([0.25, 0.125, 0.25, 0.375])
    assert [numbers[f"quadrant/q{q}_kept_frac"] for q in (1, 2, 3, 4)] == [1, 1, 1, 0]
    assert numbers["quadrant/entropy_split_nats"] == 0.5
    assert numbers["quadrant/divergence_split_nats"] == 0.5


def test_teacher_entropy(stats):
    numbers = QuadrantTelemetry("median", "mean")(stats, KEPT, None, 0)
    mean = (math.log(2) + 1) / 5
    assert numbers["teacher/entropy_nats"] == pytest.approx(mean)
    variance = (3 * mean**2 + (math.log(2) - mean) ** 2 + (1 - mean) ** 2) / 5
    assert numbers["teacher/entropy_std_nats"] == pytest.approx(math.sqrt(variance))
    # exp(−H): 1, 1, 0.5, 1, 0.37
    assert numbers["teacher/typical_prob_median"] == 1.0


def test_thresholds_are_settings(stats):
    numbers = QuadrantTelemetry(entropy_split="0.15", divergence_split="q1.0")(stats, KEPT, None, 0)
    assert (numbers["quadrant/entropy_split_nats"], numbers["quadrant/divergence_split_nats"]) == (0.15, 1.5)
    # nothing lies strictly above the highest δ; only the first token has h ≤ 0.15
    assert [numbers[f"quadrant/q{q}_frac"] for q in (1, 2, 3, 4)] == pytest.approx([0, 0.8, 0, 0.2])
    assert "quadrant/q1_kept_frac" not in numbers
    (through_loader,) = [t for t in load_telemetry({"entropy_split": "0.15"}) if isinstance(t, QuadrantTelemetry)]
    assert through_loader(stats, KEPT, None, 0)["quadrant/entropy_split_nats"] == 0.15


@pytest.mark.parametrize("split", ["middle", "q1.5", "q", "-1", "nan", ""])
def test_a_split_that_is_none_is_an_error_of_one_line(split):
    with pytest.raises(UserError, match="entropy_split"):
        QuadrantTelemetry(entropy_split=split)


def test_an_option_that_no_telemetry_takes_is_an_error():
    with pytest.raises(UserError, match="entropysplit"):
        load_telemetry({"entropysplit": "0.1"})


def test_labels_for_the_token_record(stats):
    assert QuadrantTelemetry("median", "mean").label_tokens(stats)["quadrant"].tolist() == [4, 2, 3, 1, 4]


def test_many_certain_tokens_are_low_although_the_median_is_theirs(make_stats):
    stats = make_stats(h=[0.0, 0.0, 0.0, 1.0], delta=[0.0] * 4)
    assert QuadrantTelemetry("median", "mean").label_tokens(stats)["quadrant"].tolist() == [4, 4, 4, 2]


def test_a_step_without_tokens_has_no_numbers(make_stats):
    empty = make_stats(rollout=[], h=[], delta=[], forward=[])
    none_N = torch.zeros(0, dtype=torch.bool)
    assert QuadrantTelemetry()(empty, none_N, None, 0) == {}
    assert ShadowMasks()(empty, none_N, None, 0) == {}


class TestShadowMasks:
    def test_jaccard_by_hand(self):
        # both in 1, either in 3
        assert jaccard(torch.tensor([True, True, False]), torch.tensor([True, False, True])) == pytest.approx(1 / 3)

    def test_each_rule_at_the_budget_of_the_trained_mask(self, random_stats):
        stats = random_stats(400, 6, seed=0)
        selector = load_selector("soft_or", retention=0.3, normalise_over="batch")
        selector.prepare(stats)
        kept_N = selector(stats, 5).kept_N
        numbers = ShadowMasks()(stats, kept_N, selector, 5)
        assert set(numbers) == {f"select/jaccard_{rule.name}" for rule in RULES if rule.name != "soft_or"}
        for name in ("entropy", "divergence", "q3", "random", "entropy_sample"):
            other = load_selector(name, retention=0.3, normalise_over="batch")
            other.prepare(stats)
            assert numbers[f"select/jaccard_{name}"] == jaccard(kept_N, other(stats, 5).kept_N)

    def test_shadows_have_the_active_rules_clip(self, random_stats):
        stats = random_stats(400, 6, seed=3)
        kept_N = load_selector("q3", retention=0.3, clip_quantile=0.6)(stats).kept_N
        numbers = ShadowMasks()(stats, kept_N, load_selector("divergence", clip_quantile=0.6), 0)
        assert numbers["select/jaccard_q3"] == 1.0
        assert ShadowMasks()(stats, kept_N, load_selector("divergence"), 0)["select/jaccard_q3"] < 1.0

    def test_a_rule_of_the_users_own_is_measured_by_what_it_kept(self, random_stats):
        stats = random_stats(100, 2, seed=1)
        numbers = ShadowMasks()(stats, load_selector("divergence", retention=0.4)(stats).kept_N, object(), 0)
        assert numbers["select/jaccard_divergence"] == 1.0
        assert set(numbers) == {f"select/jaccard_{rule.name}" for rule in RULES}

    def test_rules_whose_statistics_are_not_at_hand_are_left_out(self, make_stats):
        numbers = ShadowMasks()(make_stats(h=[0.1, 0.2]), torch.tensor([True, False]), None, 0)
        assert "select/jaccard_entropy" in numbers and "select/jaccard_soft_or" not in numbers

    def test_training_on_all_tokens_overlaps_with_nothing_worth_saying(self, random_stats):
        assert ShadowMasks()(random_stats(10, 2, seed=0), torch.ones(10, dtype=torch.bool), None, 0) == {}

    def test_it_leaves_the_active_rule_as_it_was(self, random_stats):
        stats = random_stats(100, 2, seed=2)
        selector = load_selector("soft_or", normalise_over="running")
        kept_N = selector(stats).kept_N
        selector.end_step(lambda counts: counts)
        state = selector.state_dict()
        ShadowMasks()(stats, kept_N, selector, 0)
        selector.end_step(lambda counts: counts * 0)
        again = load_selector("soft_or", normalise_over="running")
        again.load_state_dict(state)
        again.end_step(lambda counts: counts * 0)
        assert selector.state_dict() == again.state_dict()
