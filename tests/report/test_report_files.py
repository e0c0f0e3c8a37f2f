"""What the report writes and prints, and how it refuses."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from report_tables import Paper

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "assets" / "paper" / "tables.csv"
ALL = {"a": 0.5, "b": 0.5, "c": 0.75, "d": 0.25}
SOFT = {"a": 0.75, "b": 0.5, "c": 1.0, "d": 0.25}


def report(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    out = folder.parent / "out"
    command = [sys.executable, str(ROOT / "scripts" / "report.py"), str(folder), "--table", "table5", "--out", str(out)]
    return subprocess.run([*command, *more], capture_output=True, text=True, env={"COLUMNS": "110", "PATH": ""})


def test_report_writes_table_json_and_picture_and_shows_the_same(make_run):
    make_run("all", 1.0, ALL)
    folder = make_run("soft_or", 0.5, SOFT)
    done = report(folder)
    assert done.returncode == 0, done.stderr
    table = (folder.parent / "out" / "table.md").read_text()
    # ours 62.5 ± 7.2·… : deviations of 0.75, 0.5, 1.0, 0.25 from 0.625 are ±0.125, ±0.375: √(0.3125/3)/2 = 0.161
    # difference +12.5 ± 7.2 (see test_report_stats); the paper's row is copied from tables.csv
    assert "| soft_or 50 % | 62.5 ± 16.1 | +12.5 ± 7.2 | 79.1 ± 0.8 | 74.7 ± 1.0 | 56.2 ± 1.2 |" in table
    assert "| before training | 25.0 ± 0.0 |" in table
    assert "| teacher | 100.0 ± 0.0 |" in table
    # 12.5 is less than 2 · 7.2
    assert "not told apart from all tokens: soft_or 50 %" in table
    assert "One seed" in table
    assert "62.5 ± 16.1" in done.stdout and "+12.5 ± 7.2" in done.stdout
    picture = (folder.parent / "out" / "figure.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


def test_a_missing_cell_prints_a_dash_and_is_null(make_run):
    folder = make_run("all", 1.0, ALL)
    assert report(folder).returncode == 0
    table = (folder.parent / "out" / "table.md").read_text()
    assert "| soft_or 20 % | - | - | 77.6 ± 0.7 |" in table
    assert "| soft_or 20 % | - | - | - | - | - | - | - |" in table  # the cost table
    values = json.loads((folder.parent / "out" / "table.json").read_text())
    (row,) = [
        s for s in values["groups"][0]["suites"][0]["stats"] if s["cell"] == {"selector": "soft_or", "retention": 0.2}
    ]
    assert row["accuracy"] is None and row["minus_all"] is None


def test_json_holds_fractions(make_run):
    folder = make_run("all", 1.0, ALL)
    report(folder)
    values = json.loads((folder.parent / "out" / "table.json").read_text())
    assert values["groups"][0]["suites"][0]["stats"][0]["accuracy"]["mean"] == 0.5


def test_a_suite_of_the_paper_stands_beside_the_same_benchmark(make_run):
    folder = make_run("all", 1.0, ALL, suite="aime24")
    report(folder)
    table = (folder.parent / "out" / "table.md").read_text()
    assert "ours on AIME 2024, the paper's on AIME 2024" in table
    assert "| all | 50.0 ± 10.2 |  | 21.9 ± 1.2 | 21.5 ± 1.1 | 2.4 ± 0.7 |" in table
    assert "cannot show the paper's accuracies" not in table


def test_a_folder_with_unfinished_runs_only_names_them(make_run):
    folder = make_run("all", 1.0, ALL, done=False, name="half")
    done = report(folder)
    assert done.returncode == 0, done.stderr
    assert "Not finished, so not counted: half." in done.stdout


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "all-1.0-2-seed0" / "metrics.jsonl").write_text("{"), "metrics.jsonl line 1 is not JSON"),
        (lambda f: (f / "all-1.0-2-seed0" / "config.json").write_text("{}"), "is no run's configuration"),
        (lambda f: (f / "all-1.0-2-seed0" / "config.json").unlink(), "holds no run folder"),
    ],
)
def test_unusable_input_is_one_line_and_exit_2(make_run, break_it, message):
    folder = make_run("all", 1.0, ALL)
    break_it(folder)
    done = report(folder)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_an_unknown_table_is_one_line_and_exit_2(make_run):
    done = report(make_run("all", 1.0, ALL), "--table", "table99")
    assert done.returncode == 2
    assert done.stderr == "report: --table table99 is unknown; give one of: table5\n"


def test_the_papers_cells_and_numbers_are_those_of_the_data_file():
    paper = Paper.read(PAPER, "table5")
    assert [str(cell) for cell in paper.cells] == [
        "all",
        "entropy_sample 50 %",
        "entropy_sample 20 %",
        "soft_or 50 %",
        "soft_or 20 %",
    ]
    with PAPER.open(newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row["table"] == "table5"]
    assert len(rows) == 5 * 3 * 3  # cells × pairs × benchmarks
    for row in rows:
        (cell,) = [c for c in paper.cells if (c.selector, c.retention) == (row["method"], float(row["retention"]))]
        assert paper.value(row["pair"], row["benchmark"], cell) == f"{row['value']} ± {row['std']}"


def test_the_data_file_is_the_one_that_was_handed_over():
    source = ROOT.parent / "shared" / "paper" / "tables.csv"
    if not source.exists():
        pytest.skip("the source of assets/paper/tables.csv is not beside this checkout")
    assert PAPER.read_bytes() == source.read_bytes()
