#!/usr/bin/env python
"""Report on one run, or on run folders as a table next to the paper's, on the terminal and as files.

    python scripts/report.py runs/mine
    python scripts/report.py runs/table5 --table table5 --out runs/table5/report

Reads config.json, metrics.jsonl, eval/*.json and tokens/*.parquet of every run folder; writes report.html (everything,
with figures) and table.md; for a table also table.csv, table.json and figure.png.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from opsd.utils.errors import UserError, exits_on_bad_input
from opsd.utils.markdown import markdown_text
from reporting.cells import CellName
from reporting.csv_files import our_rows, paper_rows, write_csv
from reporting.leaderboard import gains_of, leaderboard, ranked
from reporting.one_run import one_run
from reporting.page import Section, page
from reporting.paper import BENCHMARKS, LAYOUTS, Paper
from reporting.pictures import pictures
from reporting.plots import overview
from reporting.remarks import remarks
from reporting.results import Measure
from reporting.runs import Run, by_protocol, read_run, read_runs
from reporting.stats import CellCost, SuiteReport, best_of, cell_costs, cell_stats, reference, suite_names
from reporting.tables import TextTable, accuracy_table, best_table, cost_table, others_tables
from reporting.theme import png

FILES = ("report.html", "table.md", "table.csv", "table.json", "figure.png")


@dataclass(frozen=True)
class GroupReport:
    """The numbers of runs that share a protocol."""

    runs: list[Run]
    suites: list[SuiteReport]
    costs: list[CellCost]

    @property
    def title(self) -> str:
        """Models and number of steps."""
        config = self.runs[0].config
        teacher = config["teacher"]["model"]
        return f"student {config['student']} ← teacher {teacher}, {config['steps']} steps"


def report_group(group: list[Run], paper: Paper, named: tuple[str, ...] = ()) -> GroupReport:
    """All numbers of one group: the cells in `named`, or the paper's followed by other cells that were run."""
    known = {cell.slug: cell for cell in [*paper.cells, *(run.cell for run in group)]}
    try:
        cells = [known[slug] if slug in known else CellName.parse(slug) for slug in named or known]
    except ValueError as error:
        raise UserError(f"--cells {error}") from error
    group = [run for run in group if run.cell in cells]
    suites = [
        SuiteReport(
            name,
            cell_stats(group, cells, name, paper.baseline),
            best_of(group, cells, name),
            reference(group, "step_0", name),
            reference(group, "teacher", name),
        )
        for name in suite_names(group)
    ]
    return GroupReport(group, suites, cell_costs(group, cells))


def text_tables(group: GroupReport, paper: Paper) -> list[TextTable]:
    """The group's tables in reading order."""
    tables = [accuracy_table(suite.name, suite.stats, suite.before, suite.teacher, paper) for suite in group.suites]
    for suite in group.suites:
        if ranked(gains := gains_of(suite.stats)):
            tables.append(leaderboard(gains, Measure(f"mean@k on {BENCHMARKS.get(suite.name, suite.name)}")))
    if paper.best:
        tables += [best_table(suite.name, suite.best, paper) for suite in group.suites]
    if not any(suite.name in paper.benchmarks for suite in group.suites):
        tables += others_tables(paper.cells, paper)
    return [*tables, cost_table(group.costs, paper)]


def group_remarks(group: GroupReport, paper: Paper) -> list[str]:
    """What the group can and cannot show."""
    first = group.suites[0].stats if group.suites else []
    return remarks(group.runs, [suite.name for suite in group.suites], first, paper.baseline)


def as_json(group: GroupReport, paper: Paper) -> dict[str, Any]:
    """The group's numbers as JSON values: fractions, GiB, seconds; missing values are null."""
    return {
        "title": group.title,
        "runs": [str(run.path) for run in group.runs],
        "suites": [dataclasses.asdict(suite) for suite in group.suites],
        "costs": [dataclasses.asdict(cost) for cost in group.costs],
        "remarks": group_remarks(group, paper),
    }


def write(groups: list[GroupReport], title: str, paper: Paper, out: Path) -> None:
    """Write all files of the report."""
    out.mkdir(parents=True, exist_ok=True)
    parts, sections, rows = [f"# {markdown_text(title)}\n"], [], []
    for group in groups:
        tables, lines = text_tables(group, paper), group_remarks(group, paper)
        parts.append(f"## {markdown_text(group.title)}\n")
        parts += [table.markdown() for table in tables]
        parts.append("\n".join(f"- {markdown_text(line)}" for line in lines) + "\n")
        sections.append(Section(group.title, lines, tables, pictures(group.runs, group.suites, group.costs, paper)))
        rows += our_rows(group.title, [(suite.name, suite.stats) for suite in group.suites], group.costs)
    (out / "table.md").write_text("\n".join(parts))
    values = {"title": title, "groups": [as_json(group, paper) for group in groups]}
    (out / "table.json").write_text(json.dumps(values, indent=1) + "\n")
    write_csv([*rows, *paper_rows(paper)], out / "table.csv")
    (out / "report.html").write_text(page(title, sections), encoding="utf-8")
    reports = [
        (f"{BENCHMARKS.get(suite.name, suite.name)}\n{group.title}", suite, group.costs)
        for group in groups
        for suite in group.suites
    ]
    if reports:
        (out / "figure.png").write_bytes(png(lambda: overview(reports)))


def show(groups: list[GroupReport], title: str, paper: Paper, out: Path) -> None:
    """Print the report on the terminal."""
    console = Console(highlight=False)
    console.rule(f"[bold]{title}")
    for group in groups:
        console.print(f"{group.title}\n", markup=False)
        for table in text_tables(group, paper):
            console.print(table.rich())
            console.print()
        for line in group_remarks(group, paper):
            console.print(f"• {line}", markup=False)
    console.print()
    for file in FILES:
        if (out / file).exists():
            console.print(f"{out / file}", markup=False, soft_wrap=True)


def write_one(run: Run, out: Path) -> Section:
    """A single run's files: report.html, table.md."""
    section = one_run(run)
    out.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"- {markdown_text(line)}\n" for line in section.remarks)
    tables = "\n".join(table.markdown() for table in section.tables)
    (out / "table.md").write_text(f"# {markdown_text(section.title)}\n\n{lines}\n{tables}")
    (out / "report.html").write_text(
        page(section.title, [dataclasses.replace(section, title="")], note=""), encoding="utf-8"
    )
    return section


def show_one(section: Section, out: Path) -> None:
    """Print a single run's report on the terminal."""
    console = Console(highlight=False)
    console.print(section.title, style="bold", markup=False)
    for line in section.remarks:
        console.print(f"• {line}", markup=False)
    for table in section.tables:
        console.print()
        console.print(table.rich())
    console.print(f"\n{out / 'report.html'}\n{out / 'table.md'}", markup=False, soft_wrap=True)


def main(
    runs: Annotated[Path, tyro.conf.Positional],
    table: str | None = None,
    out: Path | None = None,
    cells: tuple[str, ...] = (),
) -> None:
    """Report on a single run: curves, tokens, lengths and evaluations. Or on several, as a table next to the paper's.

    On the terminal and as files: report.html and its parts.

    Args:
        runs: A run folder; or, with --table, the folder that holds the run folders.
        table: Which table of the paper, e.g. table5, or which sweep, e.g. sweep_retention.
        out: Folder to write to; RUNS/report by default.
        cells: Only these cells, named as in recipes, e.g. all soft_or-50; none: all that exist.
    """
    out = out or runs / "report"
    if table is None:
        if not (runs / "config.json").is_file():
            raise UserError(f"{runs} is not a run folder (it has no config.json); for a folder of runs give --table")
        show_one(write_one(read_run(runs), out), out)
        return
    if table not in LAYOUTS:
        raise UserError(f"--table {table} is unknown; give one of: {', '.join(LAYOUTS)}")
    layout = LAYOUTS[table]
    paper = Paper.read(*layout.tables)
    found = [report_group(group, paper, cells) for group in by_protocol(read_runs(runs, layout.axes))]
    groups = [group for group in found if group.runs]
    if not groups:
        raise UserError(f"{runs} holds none of --cells {' '.join(cells)}; omit the flag to see what it holds")
    write(groups, layout.title, paper, out)
    show(groups, layout.title, paper, out)


if __name__ == "__main__":
    with exits_on_bad_input("report"):
        tyro.cli(main)
