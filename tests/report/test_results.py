"""Results as data, and claims judged by them, against hand arithmetic on four problems and two seeds."""

import json
import math
import shutil
import subprocess
import sys

import pytest

from opsd.utils.errors import UserError
from reporting.claims import Claim, judge, read_claims
from reporting.results import Results, collect, with_earlier, write_results

ALL = {0: {"a": 0.5, "b": 0.5, "c": 0.75, "d": 0.25}, 1: {"a": 0.5, "b": 0.5, "c": 0.5, "d": 0.5}}
SOFT = {0: {"a": 0.75, "b": 0.5, "c": 1.0, "d": 0.25}, 1: {"a": 0.5, "b": 0.5, "c": 0.75, "d": 0.25}}
STEPS = ({"step": 1, "select/kept_frac": 0.5, "quadrant/q1_frac": 0.25}, {"step": 2, "select/kept_frac": 0.4})


@pytest.fixture
def runs(make_run):
    for seed in (0, 1):
        make_run("all", 1.0, ALL[seed], seed=seed, name=f"pocket-all-seed{seed}")
        folder = make_run("soft_or", 0.5, SOFT[seed], seed=seed, name=f"pocket-soft_or-50-seed{seed}", metrics=STEPS)
    for config in folder.glob("*/config.json"):
        values = json.loads(config.read_text())
        config.write_text(json.dumps(values | {"eval": {"samples": 16}}))
    return folder


@pytest.fixture
def results(runs):
    return Results(collect(runs, "c0ffee", "recipes/table5_soft_or.sh"))


def claim(expected, cell="soft_or-50", minus="all"):
    return Claim("Table 5", "says", "pocket", cell, minus, expected)


def test_a_file_of_results_holds_every_run_and_where_it_came_from(results):
    values = results.values
    assert (values["commit"], values["command"]) == ("c0ffee", "recipes/table5_soft_or.sh")
    assert (values["suite"], values["samples"], values["problems"]) == ("pocket", 16, ["a", "b", "c", "d"])
    assert [run["cell"] for run in values["runs"]] == [*["all"] * 2, *["soft_or-50"] * 2]
    assert results.seeds("soft_or-50") == [0, 1]
    assert results.scores_SP("soft_or-50", [1, 0]).tolist() == [list(SOFT[1].values()), list(SOFT[0].values())]
    # kept: (0.5 + 0.4) / 2; the quadrant was logged once; nothing was logged by the other cell
    assert [run["kept_frac"] for run in values["runs"]] == [None, None, pytest.approx(0.45), pytest.approx(0.45)]
    assert [run["q1_frac"] for run in values["runs"]] == [None, None, 0.25, 0.25]


def test_an_interval_joins_the_errors_over_problems_and_over_seeds(results):
    verdict = judge(claim("above"), {"pocket": results}, margin=0.02)
    # test_report_stats.py: mean 0.0625, error over problems 0.080687, over seeds 0.0625
    assert verdict.difference is not None and verdict.difference.mean == 0.0625 and verdict.seeds == [0, 1]
    assert verdict.error == pytest.approx(math.hypot(0.080687, 0.0625), abs=1e-6)


@pytest.mark.parametrize(
    ("mean", "error", "expected", "word"),
    [
        (0.05, 0.02, "above", "reproduced"),  # 0.01 to 0.09
        (0.05, 0.03, "above", "inconclusive"),  # −0.01 to 0.11
        (-0.05, 0.02, "above", "not reproduced"),
        (-0.05, 0.02, "below", "reproduced"),
        (0.05, 0.02, "below", "not reproduced"),
        (-0.005, 0.005, "not_below", "reproduced"),  # −0.015 is above −0.02
        (-0.005, 0.01, "not_below", "inconclusive"),
        (-0.05, 0.01, "not_below", "not reproduced"),
        (0.005, 0.005, "not_above", "reproduced"),
        (0.05, 0.01, "not_above", "not reproduced"),
    ],
)
def test_a_claim_is_judged_by_where_its_whole_interval_lies(mean, error, expected, word):
    # four problems' differences, the same under both seeds: no error over those
    step = error * math.sqrt(3)  # deviation √(4·step²/3)/√4 = step/√3
    other = [mean + step, mean - step, mean + step, mean - step]
    values = [("all", seed, [0.0] * 4) for seed in (0, 1)] + [("x", seed, other) for seed in (0, 1)]
    file = {"runs": [{"cell": cell, "seed": seed, "scores": scores} for cell, seed, scores in values]}
    verdict = judge(claim(expected, cell="x"), {"pocket": Results(file)}, margin=0.02)
    assert (verdict.word, verdict.error) == (word, pytest.approx(error))


def test_one_seed_tells_nothing_of_others(runs, results):
    only = Results({**results.values, "runs": [run for run in results.values["runs"] if run["seed"] == 0]})
    assert judge(claim("below"), {"pocket": only}, margin=0.02).word == "inconclusive"


def test_a_cell_that_was_not_run_is_said_so(results):
    assert judge(claim("above", cell="q3-20"), {"pocket": results}, margin=0.02).word == "not run"
    assert judge(claim("above"), {}, margin=0.02).word == "not run"


def test_runs_on_other_problems_are_refused(make_run, runs):
    make_run("q3", 0.2, {"a": 1.0}, name="pocket-q3-20-seed0")
    with pytest.raises(UserError, match="evaluated on other problems"):
        collect(runs, "c", "x")


def test_the_committed_claims_can_be_read_and_a_wrong_one_is_named(tmp_path):
    claims, margin = read_claims(_committed())
    assert len(claims) > 15 and margin == 0.02
    file = tmp_path / "claims.json"
    file.write_text(json.dumps({"margin": 0.1, "claims": [vars(claim("sideways"))]}))
    with pytest.raises(UserError, match="'sideways' is unknown"):
        read_claims(file)


def test_what_was_run_earlier_is_taken_over_with_where_it_came_from(results, make_run, runs, tmp_path):
    earlier = tmp_path / "earlier.json"
    write_results(earlier, {**results.values}, results.values["runs"])
    for old in runs.glob("pocket-soft_or-*"):
        shutil.rmtree(old)
    shutil.rmtree(runs / "pocket-all-seed1")
    joined = with_earlier(collect(runs, "f00d", "today"), earlier)
    assert (joined["commit"], joined["command"]) == ("f00d", "today")
    assert [(run["cell"], run["seed"]) for run in joined["runs"]] == [
        (c, s) for c in ("all", "soft_or-50") for s in (0, 1)
    ]
    source = {"commit": "c0ffee", "command": "recipes/table5_soft_or.sh", "cells": ["all", "soft_or-50"]}
    assert joined["earlier"] == [source]
    write_results(earlier, {**results.values, "steps": 7}, results.values["runs"])
    with pytest.raises(UserError, match="another 'steps'"):
        with_earlier(collect(runs, "f00d", "today"), earlier)


def _committed():
    from results import ROOT

    return ROOT / "docs" / "results" / "claims.json"


@pytest.mark.e2e
def test_the_command_writes_a_file_that_claims_reads_back(runs, tmp_path):
    script, out = _committed().parents[2] / "scripts" / "results.py", tmp_path / "pocket.json"
    subprocess.run([sys.executable, script, "collect", runs, "--command", "x", "--out", out], check=True)
    shown = subprocess.run(
        [sys.executable, script, "claims", f"pocket={out}", "--markdown"], check=True, capture_output=True, text=True
    ).stdout
    row = "| Soft-OR at 50 % beats all tokens | Table 5 | +6.2 ± 10.2 | 2 | inconclusive |"
    assert row in shown.splitlines()
    bad = subprocess.run([sys.executable, script, "claims", "pocket"], capture_output=True, text=True)
    assert (bad.returncode, bad.stderr) == (
        2,
        "results: pocket: give NAME=FILE, e.g. pocket=docs/results/pocket.json\n",
    )
