"""What the report writes and prints, and how it refuses."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

import report as report_script
from opsd.utils.errors import UserError
from reporting.paper import LAYOUTS, TABLES, Paper

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "assets" / "paper" / "tables.csv"
ALL = {"a": 0.5, "b": 0.5, "c": 0.75, "d": 0.25}
SOFT = {"a": 0.75, "b": 0.5, "c": 1.0, "d": 0.25}


@pytest.fixture
def report(capsys, monkeypatch):
    """Runs the script in this process: reports a folder of runs into its neighbour `out`, returns what was printed."""
    monkeypatch.setenv("COLUMNS", "110")

    def run(folder: Path, table: str = "table5", figures: bool = False, cells: tuple[str, ...] = ()) -> str:
        if not figures:  # they take a second
            monkeypatch.setattr(report_script, "pictures", lambda *_: [])
            monkeypatch.setattr(report_script, "png", lambda *_: b"")
        report_script.main(folder, table, folder.parent / "out", cells)
        return capsys.readouterr().out

    return run


def command(folder: Path, table: str) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, str(ROOT / "scripts" / "report.py"), str(folder), "--table", table]
    out = ["--out", str(folder.parent / "out")]
    return subprocess.run([*script, *out], capture_output=True, text=True, env={"COLUMNS": "110", "PATH": ""})


def test_report_writes_table_json_and_picture_and_shows_the_same(make_run, report):
    make_run("all", 1.0, ALL)
    folder = make_run("soft_or", 0.5, SOFT)
    shown = report(folder, figures=True)
    table = (folder.parent / "out" / "table.md").read_text()
    # ours 62.5 ± 7.2·… : deviations of 0.75, 0.5, 1.0, 0.25 from 0.625 are ±0.125, ±0.375: √(0.3125/3)/2 = 0.161
    # difference +12.5 ± 7.2 (see test_report_stats); the paper's row is copied from tables.csv
    assert "| soft_or 50 % | 62.5 ± 16.1 | +12.5 ± 7.2 | 79.1 ± 0.8 | 74.7 ± 1.0 | 56.2 ± 1.2 |" in table
    assert "| before training | 25.0 ± 0.0 |" in table
    assert "| teacher | 100.0 ± 0.0 |" in table
    # 12.5 is less than 2 · 7.2
    assert "not distinguishable from all tokens: soft_or 50 %" in table
    assert "One seed" in table
    assert "62.5 ± 16.1" in shown and "+12.5 ± 7.2" in shown
    picture = (folder.parent / "out" / "figure.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


def test_a_missing_cell_prints_a_dash_and_is_null(make_run, report):
    folder = make_run("all", 1.0, ALL)
    report(folder)
    table = (folder.parent / "out" / "table.md").read_text()
    assert "| soft_or 20 % | - | - | 77.6 ± 0.7 |" in table
    assert "| soft_or 20 % | - | - | - | - | - | - | - |" in table  # the cost table
    values = json.loads((folder.parent / "out" / "table.json").read_text())
    (row,) = [
        s
        for s in values["groups"][0]["suites"][0]["stats"]
        if s["cell"] == {"selector": "soft_or", "retention": 0.2, "variant": ""}
    ]
    assert row["accuracy"] is None and row["minus_all"] is None


def test_json_holds_fractions(make_run, report):
    folder = make_run("all", 1.0, ALL)
    report(folder)
    values = json.loads((folder.parent / "out" / "table.json").read_text())
    assert values["groups"][0]["suites"][0]["stats"][0]["accuracy"]["mean"] == 0.5


def test_a_suite_of_the_paper_stands_beside_the_same_benchmark(make_run, report):
    folder = make_run("all", 1.0, ALL, suite="aime24")
    report(folder)
    table = (folder.parent / "out" / "table.md").read_text()
    assert "ours on AIME 2024, the paper's on AIME 2024" in table
    assert "| all | 50.0 ± 10.2 |  | 21.9 ± 1.2 | 21.5 ± 1.1 | 2.4 ± 0.7 |" in table
    assert "cannot show the paper's accuracies" not in table


def test_a_folder_with_unfinished_runs_only_names_them(make_run, report):
    folder = make_run("all", 1.0, ALL, done=False, name="half")
    assert "Not finished, so not counted: half." in report(folder)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "all-1.0-2-seed0" / "metrics.jsonl").write_text("{"), "metrics.jsonl line 1 is not JSON"),
        (lambda f: (f / "all-1.0-2-seed0" / "config.json").write_text("{}"), "is not a run's configuration"),
        (lambda f: (f / "all-1.0-2-seed0" / "config.json").unlink(), "holds no run folder"),
    ],
)
def test_unusable_input_is_one_line(make_run, report, break_it, message):
    folder = make_run("all", 1.0, ALL)
    break_it(folder)
    with pytest.raises(UserError) as stop:
        report(folder)
    assert message in str(stop.value) and "\n" not in str(stop.value)


@pytest.mark.e2e
def test_an_unknown_table_is_one_line_and_exit_2(make_run):
    done = command(make_run("all", 1.0, ALL), "table99")
    assert done.returncode == 2
    assert done.stderr == f"report: --table table99 is unknown; give one of: {', '.join(LAYOUTS)}\n"


def test_the_papers_cells_and_numbers_are_those_of_the_data_file():
    paper = Paper.read("table5")
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
        pytest.skip("needs the source of assets/paper/tables.csv beside this checkout")
    assert PAPER.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("table", TABLES)
def test_every_table_stands_with_the_papers_cells_pairs_and_numbers(make_run, report, table):
    paper = Paper.read(table)
    with PAPER.open(newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row["table"] == table and row["benchmark"] != "peak_memory"]
    for row in rows:
        method = row["method"].removeprefix("entropy_sample+")
        cell = next(c for c in paper.cells if (c.selector, c.retention) == (method, float(row["retention"])))
        printed = f"{row['value']} ± {row['std']}" if row["std"] else row["value"]
        assert paper.value(row["pair"], row["benchmark"], cell) == printed
    baseline = paper.baseline
    folder = make_run(baseline.selector, baseline.retention, ALL)
    shown = report(folder, table)
    written = (folder.parent / "out" / "table.md").read_text()
    assert TABLES[table] in shown and written.startswith(f"# {TABLES[table]}\n")
    # each cell of the paper has its row, ours a dash where nothing ran
    first = paper.benchmarks[0]
    for cell in paper.cells:
        ours = "50.0 ± 10.2 |  |" if cell == baseline else "- | - |"
        theirs = " | ".join(paper.value(pair, first, cell) for pair in paper.pairs)
        assert f"| {cell} | {ours} {theirs} |" in written


def test_every_recipe_has_its_table():
    called = {
        line.split()[1]
        for file in (ROOT / "recipes").glob("*.sh")
        for line in file.read_text().splitlines()
        if line.startswith("run_table ")
    }
    assert called and called <= set(LAYOUTS)


def test_a_table_without_all_tokens_compares_with_its_first_cell(make_run, report):
    make_run("soft_or", 0.5, ALL)
    folder = make_run("soft_or_bottom", 0.5, {"a": 0.0, "b": 0.0, "c": 0.25, "d": 0.0})
    report(folder, "table6")
    table = (folder.parent / "out" / "table.md").read_text()
    assert "| minus soft_or 50 % |" in table
    # differences −0.5, −0.5, −0.5, −0.25: mean −0.4375, deviations 0.0625 and 0.1875: √(0.046875/3)/2 = 0.0625
    assert "| soft_or_bottom 50 % | 6.2 ± 6.2 | -43.8 ± 6.2 |" in table
    assert "below soft_or 50 %: soft_or_bottom 50 %" in table


def test_our_name_of_adaptive_kl_stands_beside_the_papers(make_run, report):
    make_run("all", 1.0, ALL)
    folder = make_run("adaptive_kl", 0.5, SOFT)
    report(folder, "table8_adaptive_kl")
    assert "| adaptive_kl 50 % | 62.5 ± 16.1 | +12.5 ± 7.2 | 72.0 |" in (folder.parent / "out" / "table.md").read_text()


def test_memory_stands_beside_the_papers_where_it_states_it(make_run, report):
    metrics = ({"step": 1, "mem/peak_gib": 1.5, "time/step_s": 2.0},)
    folder = make_run("all", 1.0, ALL, metrics=metrics)
    report(folder, "table3")
    table = (folder.parent / "out" / "table.md").read_text()
    assert "| all | - | - | - | - | - | 1.50 | 2.00 | 72.0 | 41.6 | 35.8 |" in table


def test_best_of_k_stands_beside_figure_4(make_run, report):
    folder = make_run("all", 1.0, ALL, best=0.75)
    report(folder, "table7")
    table = (folder.parent / "out" / "table.md").read_text()
    assert "| all | 75.0 | 18.9 | 19.7 |" in table and "| q3 20 % | - | - | 20.1 |" in table


def test_csv_holds_ours_and_the_papers_in_one_unit(make_run, report):
    make_run("all", 1.0, ALL)
    folder = make_run("soft_or", 0.5, SOFT)
    report(folder)
    with (folder.parent / "out" / "table.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))

    def values(**wanted):
        return [row["value"] for row in rows if all(row[name] == value for name, value in wanted.items())]

    assert values(source="ours", selector="soft_or", quantity="mean@k") == ["0.625"]
    assert values(source="ours", selector="soft_or", quantity="mean@k minus baseline") == ["0.125"]
    assert float(values(source="paper", models="qwen3", benchmark="math500", selector="all")[0]) == pytest.approx(0.767)
    assert values(source="ours", selector="entropy_sample") == []  # what did not run has no row
    assert values(source="ours", quantity="peak memory") == []
