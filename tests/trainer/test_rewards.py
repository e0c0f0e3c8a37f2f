"""Reward weights by hand, and in an update."""

import math

import pytest

from opsd.update import paced_weights, reward_weights
from opsd.utils.errors import UserError


class TestRewardWeights:
    def test_by_hand(self):
        # β = 1/log 3: exp(reward/β) = 3, 1 → n·softmax = 1.5, 0.5; the other prompt's equal rewards give ones
        beta = 1 / math.log(3)
        weights = reward_weights([1.0, 0.5, 0.0, 0.5], ["a", "b", "a", "b"], beta)
        assert weights.tolist() == pytest.approx([1.5, 1.0, 0.5, 1.0])

    def test_a_wide_temperature_weighs_all_alike_and_huge_rewards_stay_finite(self):
        assert reward_weights([5.0, -5.0], [0, 0], 1e9).tolist() == pytest.approx([1.0, 1.0])
        assert reward_weights([1e6, 0.0], [0, 0], 0.1).tolist() == [2.0, 0.0]

    @pytest.mark.parametrize(("rewards", "beta"), [([1.0, 2.0], 0.0), ([1.0], 1.0), ([1.0, 2.0], float("nan"))])
    def test_what_does_not_fit_is_refused(self, rewards, beta):
        with pytest.raises(UserError):
            reward_weights(rewards, [0, 0], beta)


class TestPacedWeights:
    def test_by_hand(self):
        # p = ½, 1, ¼ of two, two and four rollouts: p(1−p) = ¼, 0, 3/16; Σ over eight rollouts 5/4, mean 5/32
        prompts = ["a", "b", "a", "b", "c", "c", "c", "c"]
        weights = paced_weights([1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0], prompts)
        assert weights.tolist() == pytest.approx([1.6, 0.0, 1.6, 0.0, 1.2, 1.2, 1.2, 1.2])

    def test_partial_scores_count_as_rates(self):
        assert paced_weights([0.25, 0.75, 0.5], [0, 0, 1]).tolist() == pytest.approx([1.0, 1.0, 1.0])

    @pytest.mark.parametrize("rewards", [[0.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    def test_where_no_prompt_is_in_between_all_weigh_one(self, rewards):
        assert paced_weights(rewards, ["a", "b"]).tolist() == [1.0, 1.0]
