"""Rows beyond rule and retention: how they are named, what they are compared with, which are shown."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

import report as report_script
from opsd.config import LossConfig, OptimConfig, SelectConfig, TeacherConfig, TrainConfig, to_json
from opsd.selection import load_selector
from opsd.utils.errors import UserError
from reporting.cells import NORMALISING, CellName
from reporting.runs import by_protocol, read_runs
from reporting.stats import BASELINE, cell_stats

ALL = {"a": 0.5, "b": 0.5, "c": 0.75, "d": 0.25}
SOFT = {"a": 0.75, "b": 0.5, "c": 1.0, "d": 0.25}
SGD = {"optim": {"kind": "sgd", "lr": 0.3}}
JSD = {"loss": {"divergence": "jsd"}}


def names(folder, axes=()):
    return [[str(run.cell) for run in group] for group in by_protocol(read_runs(folder, axes))]


def test_the_rules_that_read_a_scale_are_those_that_say_so():
    known = [entry.name for entry in importlib.metadata.entry_points(group="opsd.selectors")]
    rules = {name: load_selector(name) for name in known}
    assert {name for name, rule in rules.items() if getattr(rule, "normalises", False)} == set(NORMALISING)


def test_what_a_name_leaves_out_are_the_trainers_defaults():
    models = {"student": "s", "teacher": TeacherConfig(model="t"), "prompts": "p", "out": "o"}
    for divergence in ("reverse_kl", "jsd"):
        parts = {"select": SelectConfig(by="soft_or"), "loss": LossConfig(divergence=divergence)}
        whole = to_json(TrainConfig(**models, **parts))
        stated = {"select": {"by": "soft_or", "retention": 0.5}, "loss": {"divergence": divergence}}
        assert CellName.of(whole) == CellName.of(stated)
        sgd = {"kind": "sgd", "lr": OptimConfig().lr}
        assert CellName.of({**whole, "optim": {"kind": "sgd"}}) == CellName.of({**whole, "optim": sgd})


def test_cells_that_no_name_tells_apart_are_refused(tmp_path):
    flags = "--select.by all\n--select.by all --optim.beta2 0.95\n"
    script = Path(report_script.__file__).parent / "reporting" / "cells.py"
    done = subprocess.run([sys.executable, "-I", script], input=flags, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "two cells are called all" in done.stderr and not done.stdout


@pytest.mark.parametrize(
    ("by", "select", "name"),
    [
        ("soft_or", {"normalise_over": "batch"}, "soft_or 50 %"),
        ("soft_or", {"normalise_over": "running"}, "soft_or 50 % (running)"),
        ("soft_or", {"normalise_over": "running", "clip_quantile": 1.0}, "soft_or 50 % (running, clip_quantile=1)"),
        ("soft_or", {"normalise_over": "batch", "options": {"ranks": "true"}}, "soft_or 50 % (ranks=true)"),
        # reads no scale: the setting changes nothing
        ("entropy", {"normalise_over": "rollout", "clip_quantile": 1.0}, "entropy 50 %"),
        ("mine:Rule", {"normalise_over": "rollout"}, "mine:Rule 50 % (rollout)"),
        ("mine:Rule", {"normalise_over": "batch"}, "mine:Rule 50 %"),
    ],
)
def test_a_selection_is_named_by_what_differs_from_the_papers(make_run, by, select, name):
    assert names(make_run(by, 0.5, SOFT, settings={"select": select})) == [[name]]


def test_normalisation_scopes_are_rows_of_one_table_each_paired_with_all_tokens(make_run):
    make_run("all", 1.0, ALL)
    make_run("soft_or", 0.5, SOFT, settings={"select": {"normalise_over": "batch"}})
    folder = make_run("soft_or", 0.5, ALL, name="other", settings={"select": {"normalise_over": "running"}})
    (group,) = by_protocol(read_runs(folder))
    running = CellName("soft_or", 0.5, "running")
    _, batch, row = cell_stats(group, [BASELINE, CellName("soft_or", 0.5), running], "pocket")
    # (0.25 + 0 + 0.25 + 0)/4, and equal scores
    assert (batch.minus_all.mean, row.minus_all.mean) == (0.125, 0.0)


def test_where_evaluations_are_shared_is_no_part_of_the_protocol(make_run):
    make_run("all", 1.0, ALL, settings={"eval": {"cache": "runs/table5/evaluations"}})
    folder = make_run("soft_or", 0.5, SOFT, settings={"select": {"normalise_over": "batch"}})
    (folder / "evaluations").mkdir()
    (folder / "evaluations" / "teacher-0.json").write_text("{}")
    assert names(folder) == [["all", "soft_or 50 %"]]
    folder = make_run("entropy", 0.5, SOFT, settings={"eval": {"temperature": 0.5}})
    assert sorted(map(sorted, names(folder))) == [["all", "soft_or 50 %"], ["entropy 50 %"]]


def test_a_teacher_that_was_evaluated_apart_is_found_by_its_model_suites_and_sampling(make_run):
    folder = make_run("all", 1.0, ALL, settings={"eval": {"suite": ["pocket=eval.jsonl"], "temperature": 0.6}})
    (run,) = read_runs(folder)
    of_run = run.evaluation("teacher")
    (run.path / "eval" / "teacher.json").unlink()
    assert of_run is not None and run.evaluation("teacher") is None
    sampling = {"samples": 4, "temperature": 0.6, "top_p": 1.0, "top_k": 0, "max_new_tokens": 9, "seed": 1234}
    apart = {"model": "models/t", "sampling": sampling, "suites": of_run["suites"]}
    (folder / "teachers").mkdir()
    others = [{**apart, "model": "models/u"}, {**apart, "sampling": sampling | {"temperature": 1.0}}]
    others += [{**apart, "suites": {}}, {name: apart[name] for name in ("model", "sampling")}]  # as before it is done
    for number, other in enumerate(others):
        (folder / "teachers" / f"{number}.json").write_text(json.dumps(other))
    assert run.evaluation("teacher") is None
    (folder / "teachers" / "qwen3-9.json").write_text(json.dumps(apart))
    assert run.evaluation("teacher") == apart and run.evaluation("step_1") is None


def test_another_divergence_is_another_protocol_unless_the_table_compares_divergences(make_run):
    make_run("all", 1.0, ALL)
    folder = make_run("all", 1.0, ALL, name="other", settings=JSD)
    assert names(folder) == [["all"], ["all"]]
    assert names(folder, ("divergence",)) == [["all", "all (jsd)"]]


def test_an_sgd_run_stands_beside_every_rate_of_adamw_and_alone_where_there_is_none(make_run):
    folder = make_run("all", 1.0, ALL, name="sgd", settings=SGD)
    assert names(folder, ("optim",)) == [["all (sgd, lr=0.3)"]]
    make_run("all", 1.0, ALL, name="one", settings={"optim": {"lr": 1e-3}})
    make_run("all", 1.0, ALL, name="two", settings={"optim": {"lr": 5e-4}})
    assert names(folder, ("optim",)) == [["all", "all (sgd, lr=0.3)"]] * 2
    # steps are no axis
    make_run("all", 1.0, ALL, name="longer", steps=7, settings=SGD)
    assert ["all (sgd, lr=0.3)"] in names(folder, ("optim",))


def test_a_setting_that_an_older_run_does_not_know_counts_as_unset(make_run):
    make_run("all", 1.0, ALL, settings={"optim": {"lr": 1e-3}})
    folder = make_run("soft_or", 0.5, SOFT, settings={"optim": {"lr": 1e-3, "kind": "adamw"}})
    assert len(names(folder)) == 1


@pytest.mark.parametrize(
    "cell",
    [
        CellName("all", 1.0),
        CellName("all", 1.0, "jsd-beta=0.1"),
        CellName("soft_or", 0.05),
        CellName("entropy_sample", 0.125, "forward_kl"),
        CellName("soft_or", 0.5, "running-sgd-lr=1e-05"),
    ],
)
def test_a_cells_short_name_reads_back(cell):
    assert CellName.parse(cell.slug) == cell


def test_parts_of_a_name_are_shown_apart():
    assert str(CellName("soft_or", 0.5, "running-sgd-lr=1e-05")) == "soft_or 50 % (running, sgd, lr=1e-05)"


@pytest.mark.parametrize("name", ["soft_or", "all-50", "-50", ""])
def test_a_name_that_is_none_is_one_line(name):
    with pytest.raises(ValueError, match="give names as recipes have them"):
        CellName.parse(name)


@pytest.fixture
def shown(monkeypatch, tmp_path):
    """Reports a folder without figures; returns the rows of its first table and its JSON."""
    monkeypatch.setattr(report_script, "pictures", lambda *_: [])
    monkeypatch.setattr(report_script, "png", lambda *_: b"")

    def show(folder, table, *cells):
        report_script.main(folder, table, tmp_path / "out", cells)
        lines = (tmp_path / "out" / "table.md").read_text().split("**")[2].splitlines()
        rows = [line.split("|")[1:3] for line in lines if line.startswith("|")][4:]
        return [(name.strip(), ours.strip()) for name, ours in rows], json.loads(
            (tmp_path / "out" / "table.json").read_text()
        )

    return show


def test_only_the_named_cells_are_shown_in_their_order_and_one_that_did_not_run_has_a_dash(make_run, shown):
    make_run("all", 1.0, ALL)
    make_run("random", 0.5, SOFT)
    folder = make_run("soft_or", 0.5, SOFT)
    rows, values = shown(folder, "table5", "soft_or-50", "all", "soft_or-50-running")
    assert rows == [("soft_or 50 %", "62.5 ± 16.1"), ("all", "50.0 ± 10.2"), ("soft_or 50 % (running)", "-")]
    assert len(values["groups"][0]["runs"]) == 2
    assert ("random 50 %", "62.5 ± 16.1") in shown(folder, "table5")[0]


def test_cells_of_which_none_was_run_are_one_line(make_run, shown):
    with pytest.raises(UserError, match="holds none of --cells q3-20; omit the flag"):
        shown(make_run("all", 1.0, ALL), "table5", "q3-20")


def test_the_sgd_rows_of_table_6_are_paired_with_its_first_cell(make_run, shown):
    make_run("soft_or", 0.5, SOFT)
    folder = make_run("soft_or_bottom", 0.5, ALL, settings=SGD)
    _, values = shown(folder, "table6", "soft_or-50", "soft_or_bottom-50", "soft_or_bottom-50-sgd-lr=0.3")
    rows = {row["cell"]["variant"] + row["cell"]["selector"]: row for row in values["groups"][0]["suites"][0]["stats"]}
    assert rows["sgd-lr=0.3soft_or_bottom"]["minus_all"]["mean"] == -0.125
    assert rows["soft_or_bottom"]["accuracy"] is None


def test_a_sweep_shows_each_number_of_the_paper_once_whatever_tables_state_it(make_run, shown):
    make_run("all", 1.0, ALL)
    folder = make_run("entropy_sample", 0.1, SOFT)
    shown(folder, "sweep_retention")
    text = (folder.parent / "out" / "table.md").read_text()
    # Tables 3 and 5 both have all tokens; 10 % is Table 3's alone
    assert text.count("| all | 50.0 ± 10.2 |  | 76.7 ± 0.7 |") == 1
    assert "| entropy_sample 10 % | 62.5 ± 16.1 | +12.5 ± 7.2 | 70.8 ± 1.0 |" in text
