#!/usr/bin/env python
"""Figures 1 to 4 from the run folders that exist: one page, and a PNG each.

    python scripts/figures.py runs --out runs/figures

Each figure is drawn from the first of its folders under RUNS that holds finished runs; if there is none, the command
that makes its runs is printed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from opsd.utils.errors import UserError, exits_on_bad_input
from report import report_group
from reporting.page import Section, page
from reporting.paper import LAYOUTS, Paper
from reporting.pictures import pictures
from reporting.runs import by_protocol, read_runs
from reporting.theme import Picture, png

PAGE = "figures.html"


# Tables or sweeps that a figure can be drawn from, the best first; their names are also those of their folders.
SOURCES = {
    1: ("table5",),
    2: ("table5", "table3", "sweep_retention"),
    3: ("sweep_retention", "table5", "table3"),
    4: ("table7",),
}


def drawn(runs: Path, figure: int) -> tuple[str, list[tuple[str, Picture]]]:
    """The first folder that has the figure, and its pictures, each with its group's title; ("", []) if none has it."""
    for table in SOURCES[figure]:
        layout = LAYOUTS[table]
        if not any((runs / table).glob("*/DONE")):
            continue
        paper = Paper.read(*layout.tables)
        found = []
        for group in by_protocol(read_runs(runs / table, layout.axes)):
            report = report_group(group, paper)
            kept = pictures(report.runs, report.suites, report.costs, paper)
            found += [(report.title, one) for one in kept if one.title.startswith(f"Figure {figure}.")]
        if found:
            return table, found
    return "", []


def main(runs: Annotated[Path, tyro.conf.Positional], out: Path) -> None:
    """Draw every figure whose runs exist, and say which are missing.

    Args:
        runs: Folder that holds the tables' and sweeps' folders, as recipes name them (runs/table5, …).
        out: Folder to write to.
    """
    sections, lines = [], []
    out.mkdir(parents=True, exist_ok=True)
    for figure, tables in SOURCES.items():
        table, found = drawn(runs, figure)
        if not found:
            makes = f"make {tables[0].replace('_', '-')} makes them"
            lines.append(f"Figure {figure}: no finished run in {' or '.join(tables)}; {makes}")
        for number, (title, picture) in enumerate(found, start=1):
            file = out / f"figure{figure}{f'_{number}' if len(found) > 1 else ''}.png"
            file.write_bytes(png(picture.draw))
            sections.append(Section(f"{LAYOUTS[table].title}: {title}", [], [], [picture]))
            lines.append(f"{file}: from {runs / table}")
    if not sections:
        raise UserError(f"{runs} holds no finished runs of table5, table7 or a sweep; make demo is the quickest to run")
    (out / PAGE).write_text(page("Figures", sections), encoding="utf-8")
    print("\n".join([*lines, str(out / PAGE)]))


if __name__ == "__main__":
    with exits_on_bad_input("figures"):
        tyro.cli(main)
