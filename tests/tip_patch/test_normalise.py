"""ĥ and δ̂ by hand, under each scope."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opsd.utils.errors import UserError
from tip_patch.groups import Rollouts
from tip_patch.histogram import BINS, EDGES, Histogram, count_bins
from tip_patch.normalise import MinMax, Normaliser, Ranks
from tip_patch.selectors import SoftOr


def one_rollout(count: int) -> Rollouts:
    return Rollouts.of(torch.zeros(count, dtype=torch.int64))


def test_clipped_min_max_by_hand():
    # 0, 1, 2, 3, 10; the 0.875-quantile stands at place 3.5: 3 + 0.5·7 = 6.5. Then value/6.5, and 10 is clipped to 1.
    values_N = torch.tensor([0.0, 1.0, 2.0, 3.0, 10.0])
    scaled = MinMax(0.875).fit(values_N)(values_N)
    assert scaled.tolist() == pytest.approx([0, 1 / 6.5, 2 / 6.5, 3 / 6.5, 1])


def test_plain_min_max_is_the_clip_at_one():
    values_N = torch.tensor([2.0, 4.0, 12.0])
    # (4 − 2)/(12 − 2)
    assert MinMax(1.0).fit(values_N)(values_N).tolist() == pytest.approx([0, 0.2, 1])


@pytest.mark.parametrize("method", [MinMax(0.98), MinMax(1.0), Ranks()])
@pytest.mark.parametrize("scope", ["micro_batch", "rollout", "batch"])
@pytest.mark.parametrize("count", [1, 5])
def test_a_constant_normalises_to_zero(method, scope, count):
    values_N = torch.full((count,), 0.7)
    normaliser = Normaliser(method, scope, 0.9)
    normaliser.prepare(values_N)
    assert normaliser(values_N, one_rollout(count)).tolist() == [0.0] * count


def test_ranks_count_the_smaller_ones():
    # 5, 1, 1, 9: two are smaller than 5, none than 1, three than 9; of three others
    values_N = torch.tensor([5.0, 1.0, 1.0, 9.0])
    expected = [2 / 3, 0, 0, 1]
    assert Ranks().fit(values_N)(values_N).tolist() == pytest.approx(expected)
    assert Ranks().per_rollout(values_N, one_rollout(4)).tolist() == pytest.approx(expected)


def test_scope_rollout_scales_each_rollout_alone_and_micro_batch_all_together():
    values_N, rollouts = torch.tensor([0.0, 1.0, 10.0, 20.0]), Rollouts.of(torch.tensor([0, 0, 1, 1]))
    assert Normaliser(MinMax(1.0), "rollout", 0.9)(values_N, rollouts).tolist() == [0, 1, 0, 1]
    assert Normaliser(MinMax(1.0), "micro_batch", 0.9)(values_N, rollouts).tolist() == pytest.approx([0, 0.05, 0.5, 1])


def test_scope_batch_scales_by_what_prepare_saw():
    normaliser = Normaliser(MinMax(1.0), "batch", 0.9)
    normaliser.prepare(torch.tensor([0.0, 1.0, 4.0]))
    # a token outside the prepared range cannot happen in a step; it is clamped all the same
    assert normaliser(torch.tensor([1.0, 4.0, 5.0]), one_rollout(3)).tolist() == [0.25, 1, 1]


def test_scope_batch_without_prepare_says_what_to_do():
    with pytest.raises(UserError, match="prepare"):
        Normaliser(MinMax(1.0), "batch", 0.9)(torch.tensor([1.0]), one_rollout(1))


class TestRunning:
    def test_first_step_is_scope_rollout_and_a_step_changes_nothing_within(self, random_stats):
        stats = random_stats(200, 5, seed=0)
        running, rollout = SoftOr(normalise_over="running"), SoftOr(normalise_over="rollout")
        first = running(stats).kept_N
        assert torch.equal(first, rollout(stats).kept_N)
        assert torch.equal(first, running(stats).kept_N)
        running.end_step(lambda counts: counts)
        assert not torch.equal(first, running(stats).kept_N)

    def test_later_steps_scale_by_what_earlier_ones_held_and_clamp(self):
        normaliser = Normaliser(MinMax(1.0), "running", 0.9)
        normaliser(torch.tensor([0.1, 0.5, 1.1]), one_rollout(3))
        normaliser.end_step(normaliser.seen)
        # (0.6 − 0.1)/(1.1 − 0.1) = 0.5, up to bins 1.25 % wide; 0.05 and 9 lie outside
        low, middle, high = normaliser(torch.tensor([0.05, 0.6, 9.0]), one_rollout(3)).tolist()
        assert (low, high) == (0.0, 1.0)
        assert middle == pytest.approx(0.5, abs=0.01)  # bins

    def test_two_ranks_learn_what_one_process_learns(self, random_stats):
        stats = random_stats(300, 6, seed=1)
        mine = stats.rollout_N < 10
        parts = [Rows(stats, mine), Rows(stats, ~mine)]
        alone, ranks = SoftOr(normalise_over="running"), [SoftOr(normalise_over="running") for _ in parts]
        for _ in range(2):
            alone(stats)
            alone.end_step(lambda counts: counts)
            for selector, part in zip(ranks, parts, strict=True):
                selector(part.stats)
            # what both ranks hand to the reduction, added up
            seen = [torch.stack([normaliser.seen for normaliser in one._normalisers.values()]) for one in ranks]
            total = sum(seen)
            for selector in ranks:
                selector.end_step(lambda _counts, total=total: total)
        assert ranks[0].state_dict() == ranks[1].state_dict() == alone.state_dict()
        kept = alone(stats).kept_N
        for selector, part in zip(ranks, parts, strict=True):
            assert torch.equal(selector(part.stats).kept_N, kept[part.rows])

    def test_a_step_of_several_micro_batches_is_learnt_whole_and_once(self, random_stats):
        stats = random_stats(300, 6, seed=7)
        mine = stats.rollout_N < 10
        whole, pieces = SoftOr(normalise_over="running"), SoftOr(normalise_over="running")
        whole(stats)
        for part in (Rows(stats, mine), Rows(stats, ~mine)):
            pieces(part.stats)
        handed = []
        for selector in (whole, pieces):
            for _ in range(2):
                selector.end_step(lambda counts: handed.append(int(counts.sum())) or counts)
        # both statistics of all 300 tokens, then a step that saw nothing
        assert handed == [600, 0, 600, 0]
        assert whole.state_dict() == pieces.state_dict()

    def test_state_survives_json(self, random_stats):
        stats = random_stats(200, 5, seed=2)
        selector, resumed = SoftOr(normalise_over="running"), SoftOr(normalise_over="running")
        selector(stats)
        selector.end_step(lambda counts: counts)
        resumed.load_state_dict(json.loads(json.dumps(selector.state_dict())))
        later = random_stats(100, 4, seed=3)
        assert torch.equal(resumed(later).kept_N, selector(later).kept_N)

    def test_state_of_another_rule_is_refused(self):
        with pytest.raises(UserError, match="resume"):
            SoftOr(normalise_over="running").load_state_dict({"forward_kl_N": {"bins": [], "counts": []}})

    def test_other_scopes_reduce_and_save_nothing(self, random_stats):
        selector = SoftOr(normalise_over="rollout")
        selector(random_stats(20, 2, seed=0))
        selector.end_step(lambda counts: pytest.fail("no collective belongs here"))
        assert selector.state_dict() == {}

    def test_a_step_without_tokens_is_a_step(self):
        normaliser = Normaliser(MinMax(0.98), "running", 0.9)
        assert normaliser(torch.zeros(0), Rollouts.of(torch.zeros(0, dtype=torch.int64))).shape == (0,)
        normaliser.end_step(normaliser.seen)
        assert normaliser(torch.tensor([1.0, 3.0]), one_rollout(2)).tolist() == [0, 1]


class Rows:
    """Some rows of a TokenStats."""

    def __init__(self, stats, rows) -> None:
        self.rows = rows
        fields = {
            name: value[rows] if isinstance(value, torch.Tensor) else value for name, value in vars(stats).items()
        }
        self.stats = type(stats)(**fields)


class TestHistogram:
    def test_every_value_falls_in_the_bin_whose_edges_hold_it(self):
        values_M = torch.tensor([0.0, 1e-9, 1e-8, 0.3, 1.0, 11.9, 999.0, 5000.0], dtype=torch.float64)
        for value in values_M:
            bin_ = int(count_bins(value[None]).nonzero())
            assert EDGES[bin_] <= value
            assert value < EDGES[bin_ + 1] or bin_ == BINS - 1

    @given(st.lists(st.floats(1e-6, 20.0), min_size=2, max_size=60), st.floats(0.0, 1.0))
    @settings(max_examples=80, deadline=None)
    def test_quantile_lies_between_its_neighbours_up_to_a_bin(self, values, q):
        histogram = Histogram(0.9)
        histogram.add(count_bins(torch.tensor(values, dtype=torch.float64)))
        ordered = sorted(values)
        # the value below which a fraction q lies: between the order statistics on both sides of q·n
        place = q * len(values)
        low = ordered[max(0, min(int(place - 1e-9), len(values) - 1))]
        found = float(histogram.quantile(q))
        assert low / 1.013 - 1e-8 <= found <= ordered[min(int(place), len(values) - 1)] * 1.013 + 1e-8

    def test_an_old_outlier_is_forgotten(self):
        histogram = Histogram(0.5)
        histogram.add(count_bins(torch.tensor([0.1, 0.2, 900.0])))
        histogram.add(count_bins(torch.tensor([0.1, 0.2])))
        assert float(histogram.quantile(1.0)) > 800  # weight 0.5 still counts
        histogram.add(count_bins(torch.tensor([0.1, 0.2])))
        assert float(histogram.quantile(1.0)) == pytest.approx(0.2, rel=0.013)  # a bin's width; 0.25 tokens do not

    def test_below_is_the_distribution_function(self):
        histogram = Histogram(0.9)
        histogram.add(count_bins(torch.tensor([1.0, 2.0, 3.0, 4.0])))
        found = histogram.below(torch.tensor([0.5, 2.5, 3.5, 100.0]))
        assert found.tolist() == pytest.approx([0, 0.5, 0.75, 1.0])
