"""Lengths, repetition and what is left out of truncated rollouts, by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsd.rollout.lengths import (
    NGRAM,
    compression_ratio,
    length_metrics,
    loop_start,
    repeated_fraction,
    trainable,
)

PLAIN = list(range(100, 120))


@pytest.mark.parametrize(
    ("ids", "start"),
    [
        (PLAIN, 20),
        # 4 5 goes round eight times behind three other tokens: the second round begins at 3 + 2.
        ([1, 2, 3] + [4, 5] * 8, 5),
        ([7] * 20, 1),
        # Broken off in the middle of a round.
        ([1, 2, 3] + [4, 5, 6] * 5 + [4, 5], 6),
        # A loop that has not gone far enough to hold an n-gram.
        ([*PLAIN, 4, 5, 4, 5], 24),
        # One that ended before the end.
        ([4, 5] * 8 + PLAIN, 36),
        ([], 0),
    ],
)
def test_a_loop_starts_where_its_second_round_begins(ids, start):
    assert loop_start(ids) == start


def naive_fraction(ids):
    grams = [tuple(ids[first : first + NGRAM]) for first in range(len(ids) - NGRAM + 1)]
    inside = {first + k for first, gram in enumerate(grams) if grams.count(gram) > 1 for k in range(NGRAM)}
    return len(inside) / len(ids) if ids else 0.0


@given(st.lists(st.integers(0, 2), max_size=60))
def test_the_repeated_fraction_is_that_of_counting_every_ngram(ids):
    assert repeated_fraction(ids) == naive_fraction(ids)


def test_compression_sees_repetition():
    assert compression_ratio([7] * 400) > 20 > compression_ratio(list(range(400))) >= 1 == compression_ratio([])


def test_what_is_trained_on_of_truncated_rollouts(make_rollout):
    whole = make_rollout(0, [1], [*PLAIN, 9])
    cut = make_rollout(1, [1], PLAIN, truncated=True)
    looping = make_rollout(2, [1], [1, 2, 3] + [4, 5] * 8, mask=[True] * 4 + [False] * 15, truncated=True)
    rollouts = [whole, cut, looping]
    assert trainable(rollouts, "keep") is rollouts
    assert trainable(rollouts, "drop") == [whole]
    kept = trainable(rollouts, "mask_tail")
    assert kept[0] is whole
    # The last tenth of 20 tokens; and all from the loop's second round on.
    assert kept[1].response_ids == PLAIN[:18]
    assert kept[2].response_ids == [1, 2, 3, 4, 5]
    assert kept[2].student_mask == [True] * 4 + [False]
    assert [rollout.id for rollout in kept] == [0, 1, 2]


def test_lengths_are_told_for_all_and_by_reward(make_rollout):
    rollouts = [make_rollout(n, [1], list(range(length))) for n, length in enumerate((10, 20, 60))]
    rollouts.append(make_rollout(3, [1], [7] * 40, mask=[True, False] * 20))
    found = length_metrics(rollouts, [1.0, 0.5, 0.0, 0.0])
    # The tools' tokens do not count: 10, 20, 60 and 20.
    assert found["length/mean_tokens"] == 27.5
    assert (found["length/p50_tokens"], found["length/max_tokens"]) == (20, 60)
    assert found["length/mean_tokens_rewarded"] == 15
    assert found["length/mean_tokens_unrewarded"] == 40
    assert found["repetition/ngram_frac"] == 0.25
    assert found["repetition/ngram_frac_rewarded"] == 0
    assert found["repetition/ngram_frac_unrewarded"] == 0.5
    assert not [name for name in length_metrics(rollouts, None) if "rewarded" in name]
    assert not [name for name in length_metrics(rollouts[:1], [1.0]) if "unrewarded" in name]
