"""Cells against each other by the rules of docs/questions.md, by hand on two problems and two seeds."""

import math

import pytest

from opsd.utils.errors import UserError
from reporting.compare import compare, means, verdict
from reporting.results import Measure, Results
from reporting.stats import Estimate

NATS = Measure("own/reverse_kl_nats", "nats per token", 1.0, 4, higher_is_better=False)


def results(**scores):
    runs = [
        {"cell": cell, "seed": seed, "scores": own, "q3_kept_frac": 0.1 * seed}
        for cell, both in scores.items()
        for seed, own in enumerate(both)
    ]
    return Results({"runs": runs})


FOUND = results(all=[[0.5, 0.5], [0.5, 0.7]], q3=[[0.6, 0.5], [0.8, 0.7]], once=[[0.1, 0.2]])


def test_differences_are_paired_with_one_cell_or_with_all_others():
    # differences 0.1 0, 0.3 0: mean 0.1; by problem 0.2 and 0: error 0.1; by seed 0.05 and 0.15: error 0.05
    (row,) = compare(FOUND, ("q3",), "all", None).rows
    assert row == ["q3 − all", f"+10.0 ± {100 * math.hypot(0.1, 0.05):.1f}", "2", "inconclusive"]
    assert [row[0] for row in compare(FOUND, ("all", "q3", "once"), None, None).rows] == [
        "all − q3",
        "all − once",
        "q3 − once",
    ]


@pytest.mark.parametrize(
    ("mean", "error", "measure", "word"),
    [
        (0.03, 0.014, Measure(), "better"),
        (0.03, 0.016, Measure(), "inconclusive"),
        (-0.03, 0.014, Measure(), "worse"),
        (0.005, 0.007, Measure(), "alike"),
        (0.03, 0.014, NATS, "worse"),
        (-0.03, 0.014, NATS, "better"),
        (0.001, 0.004, NATS, "alike"),
        (0.001, 0.005, NATS, "inconclusive"),
    ],
)
def test_the_whole_interval_decides(mean, error, measure, word):
    assert verdict(Estimate(mean, error, 0.0), measure) == word


def test_one_seed_decides_nothing():
    assert verdict(Estimate(5.0, 0.001, None), Measure()) == "inconclusive"


def test_a_cell_without_a_common_seed_and_one_that_is_not_there():
    lone = Results({"runs": [{"cell": "a", "seed": 0, "scores": [1.0]}, {"cell": "b", "seed": 1, "scores": [1.0]}]})
    assert compare(lone, ("a",), "b", None).rows == [["a − b", "-", "0", "not run with a seed of both"]]
    with pytest.raises(UserError, match="zork: no such cell in the file; it has: a, b"):
        compare(lone, ("a",), "zork", None)


def test_means_have_their_joined_error_and_logged_means_are_over_seeds():
    # q3: by problem 0.7 and 0.6: error 0.05; by seed 0.55 and 0.75: error 0.1; a single seed has no error
    assert means(FOUND, ("q3", "once"), None, ("q3_kept_frac", "kept_frac")).rows == [
        ["q3", f"65.0 ± {100 * math.hypot(0.05, 0.1):.1f}", "2", "0.050", "-"],
        ["once", "15.0", "1", "0.000", "-"],
    ]
