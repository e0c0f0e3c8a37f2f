#!/usr/bin/env python
"""Run folders to a table beside the paper's, on the terminal and as files.

    python scripts/report.py runs/table5 --table table5 --out runs/table5/report

Reads config.json, metrics.jsonl and eval/*.json of every run folder; writes table.md, table.json and figure.png.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from report_figure import Panel, draw
from report_runs import CellName, Run, by_protocol, read_runs
from report_stats import CellCost, CellStats, Estimate, cell_costs, cell_stats, reference, suite_names
from report_tables import BENCHMARKS, Paper, TextTable, accuracy_table, aime_table, cost_table, remarks
from rich.console import Console

from opsd.errors import UserError

PAPER = Path(__file__).parent.parent / "assets" / "paper" / "tables.csv"
TABLES = {"table5": "Table 5: all tokens, entropy sampling, Soft-OR"}


@dataclass(frozen=True)
class SuiteReport:
    """One suite's numbers in one group of comparable runs."""

    name: str
    stats: list[CellStats]
    before: Estimate | None
    teacher: Estimate | None


@dataclass(frozen=True)
class GroupReport:
    """The numbers of runs that share a protocol."""

    runs: list[Run]
    suites: list[SuiteReport]
    costs: list[CellCost]

    @property
    def title(self) -> str:
        """Which models and how long."""
        config = self.runs[0].config
        teacher = config["teacher"]["model"]
        return f"student {config['student']} ← teacher {teacher}, {config['steps']} steps"


def report_group(group: list[Run], cells: list[CellName]) -> GroupReport:
    """All numbers of one group; cells that the paper's table lacks come last."""
    cells = list(dict.fromkeys([*cells, *(run.cell for run in group)]))
    suites = [
        SuiteReport(
            name, cell_stats(group, cells, name), reference(group, "step_0", name), reference(group, "teacher", name)
        )
        for name in suite_names(group)
    ]
    return GroupReport(group, suites, cell_costs(group, cells))


def text_tables(group: GroupReport, paper: Paper) -> list[TextTable]:
    """The group's tables in reading order."""
    tables = [accuracy_table(suite.name, suite.stats, suite.before, suite.teacher, paper) for suite in group.suites]
    if not any(suite.name in BENCHMARKS for suite in group.suites):
        tables.append(aime_table(paper.cells, paper))
    return [*tables, cost_table(group.costs)]


def group_remarks(group: GroupReport) -> list[str]:
    """What the group can and cannot show."""
    first = group.suites[0].stats if group.suites else []
    return remarks(group.runs, [suite.name for suite in group.suites], first)


def as_json(group: GroupReport) -> dict[str, Any]:
    """The group's numbers as JSON values: fractions, GiB, seconds; what is missing is null."""
    return {
        "title": group.title,
        "runs": [str(run.path) for run in group.runs],
        "suites": [dataclasses.asdict(suite) for suite in group.suites],
        "costs": [dataclasses.asdict(cost) for cost in group.costs],
        "remarks": group_remarks(group),
    }


def write(groups: list[GroupReport], title: str, paper: Paper, out: Path) -> None:
    """table.md, table.json and figure.png."""
    out.mkdir(parents=True, exist_ok=True)
    parts = [f"# {title}\n"]
    for group in groups:
        parts.append(f"## {group.title}\n")
        parts += [table.markdown() for table in text_tables(group, paper)]
        parts.append("\n".join(f"- {line}" for line in group_remarks(group)) + "\n")
    (out / "table.md").write_text("\n".join(parts))
    (out / "table.json").write_text(
        json.dumps({"title": title, "groups": [as_json(g) for g in groups]}, indent=1) + "\n"
    )
    panels = [
        Panel(f"{BENCHMARKS.get(s.name, s.name)}\n{group.title}", s.stats, s.before, s.teacher, group.costs)
        for group in groups
        for s in group.suites
    ]
    if panels:
        draw(panels, out / "figure.png")


def show(groups: list[GroupReport], title: str, paper: Paper, out: Path) -> None:
    """The same on the terminal."""
    console = Console(highlight=False)
    console.rule(f"[bold]{title}")
    for group in groups:
        console.print(f"{group.title}\n", markup=False)
        for table in text_tables(group, paper):
            console.print(table.rich())
        for line in group_remarks(group):
            console.print(f"• {line}", markup=False)
    console.print()
    for file in ("table.md", "table.json", "figure.png"):
        if (out / file).exists():
            console.print(f"{out / file}", markup=False, soft_wrap=True)


def main(runs: Annotated[Path, tyro.conf.Positional], table: str, out: Path) -> None:
    """Run folders to a table beside the paper's: table.md, table.json, figure.png, and the terminal.

    Args:
        runs: Folder that holds the run folders.
        table: Which table of the paper, e.g. table5.
        out: Folder to write to.
    """
    if table not in TABLES:
        raise UserError(f"--table {table} is unknown; give one of: {', '.join(TABLES)}")
    paper = Paper.read(PAPER, table)
    groups = [report_group(group, paper.cells) for group in by_protocol(read_runs(runs))]
    write(groups, TABLES[table], paper, out)
    show(groups, TABLES[table], paper, out)


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except UserError as error:
        print(f"report: {error}", file=sys.stderr)
        sys.exit(2)
