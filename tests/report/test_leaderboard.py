"""Rules ranked against all tokens, by hand on two problems and two seeds."""

import json
import math

import pytest

import results as script
from opsd.utils.errors import UserError
from reporting.cells import CellName
from reporting.leaderboard import error_of, gains_in, leaderboard, ranked
from reporting.results import Measure, Results
from reporting.stats import Estimate


def file_of(**scores):
    """A file of results: scores of two problems under seeds 0 and 1, by cell."""
    runs = [
        {"cell": cell.replace("_5", "-5").replace("_2", "-2"), "seed": seed, "scores": own}
        for cell, both in scores.items()
        for seed, own in enumerate(both)
    ]
    return Results({"runs": runs})


ALL = [[0.5, 0.5], [0.5, 0.7]]


def test_gains_are_paired_by_seed_and_problem_and_their_errors_joined():
    gains = gains_in(file_of(all=ALL, q3_50=[[0.6, 0.5], [0.8, 0.7]]))
    gain = gains[CellName("q3", 0.5)]
    # differences 0.1 0, 0.3 0: by problem 0.2 and 0, by seed 0.05 and 0.15
    assert gain.mean == pytest.approx(0.1)
    assert error_of(gain) == pytest.approx(math.hypot(0.1, 0.05))


def test_one_seed_has_the_error_over_problems():
    assert error_of(Estimate(0.1, 0.02, None)) == 0.02


def test_rules_are_ranked_by_their_mean_below_all_tokens_and_those_that_lack_a_retention_stand_below():
    gains = {
        CellName("soft_or", 0.5): Estimate(0.01, 0.0, 0.0),
        CellName("soft_or", 0.2): Estimate(-0.03, 0.0, 0.0),
        CellName("random", 0.5): Estimate(0.0, 0.003, 0.004),
        CellName("random", 0.2): Estimate(0.0, 0.0, 0.0),
        CellName("q3", 0.2): Estimate(0.5, 0.0, 0.0),
        CellName("verify", 1.0): Estimate(-0.2, 0.0, 0.0),
        CellName("all", 1.0, "paced"): Estimate(-0.0001, 0.0, 0.0),
    }
    table = leaderboard(gains, Measure())
    assert table.columns == ["", "mean below\n100 %", "100 %", "50 %", "20 %"]
    assert table.rows == [
        ["random", "+0.0", "-", "+0.0 ± 0.5", "+0.0 ± 0.0"],
        ["soft_or", "−1.0", "-", "+1.0 ± 0.0", "−3.0 ± 0.0"],
        ["q3", "-", "-", "-", "+50.0 ± 0.0"],
        ["all (paced)", "-", "+0.0 ± 0.0", "-", "-"],
        ["verify", "-", "−20.0 ± 0.0", "-", "-"],
    ]
    assert ranked(gains) and not ranked({CellName("q3", 0.2): Estimate(0.5, 0.0, 0.0)})


def test_of_nats_the_lowest_is_the_best():
    gains = {CellName(rule, 0.5): Estimate(gain, 0.0, 0.0) for rule, gain in (("q3", 0.2), ("random", -0.1))}
    table = leaderboard(gains, Measure("own/reverse_kl_nats", "nats per token", 1.0, 4, higher_is_better=False))
    assert [row[:2] for row in table.rows] == [["random", "−0.1000"], ["q3", "+0.2000"]]
    assert "lower is better" in table.title


@pytest.fixture
def real(tmp_path):
    """A file as scripts/real_bench.py writes it: measures in place of scores."""
    of = {"unit": "nats per token", "scale": 1.0, "digits": 4, "higher_is_better": False}
    runs = [
        {"cell": cell, "seed": 0, "measures": {"own/reverse_kl_nats": values}}
        for cell, values in (("all", [0.5, 0.3]), ("q3-50", [0.4, 0.3]))
    ]
    file = tmp_path / "real.json"
    file.write_text(json.dumps({"measures": {"own/reverse_kl_nats": of}, "runs": runs}))
    return file


def test_a_measure_of_a_real_pair_is_ranked_and_drawn(real, tmp_path, capsys):
    figure = tmp_path / "figure.png"
    script.rank(script.Leaderboard(real, "own/reverse_kl_nats", markdown=True, figure=figure))
    assert "| q3 | −0.0500 | −0.0500 ± 0.0500 |" in capsys.readouterr().out
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("measure", [None, "own/entropy"])
def test_a_measure_that_the_file_lacks_is_refused_with_those_that_it_has(real, measure):
    with pytest.raises(UserError, match="own/reverse_kl_nats"):
        script.rank(script.Leaderboard(real, measure))


def test_a_file_without_all_tokens_cannot_be_ranked(tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"runs": [{"cell": "q3-50", "seed": 0, "scores": [1.0]}]}))
    with pytest.raises(UserError, match="no cell besides all tokens"):
        script.rank(script.Leaderboard(file))
