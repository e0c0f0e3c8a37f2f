#!/usr/bin/env python
"""Figures 1 to 4 from the run folders that exist: one page, and a PNG each.

    python scripts/figures.py runs --out runs/figures

Each figure is drawn from the first of its folders under RUNS that holds finished runs; if there is none, the command
that makes its runs is printed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from opsd.utils.errors import UserError, exits_on_bad_input
from report import report_group
from reporting.page import Section, page
from reporting.paper import LAYOUTS, Paper
from reporting.pictures import pictures
from reporting.runs import by_protocol, read_runs
from reporting.theme import Picture

PAGE = "figures.html"


@dataclass(frozen=True)
class Source:
    """Tables or sweeps that a figure can be drawn from, the best first; their names are also those of their folders."""

    figure: int
    tables: tuple[str, ...]

    @property
    def missing(self) -> str:
        """What to do if none of the folders holds a finished run."""
        target = self.tables[0].replace("_", "-")
        return f"Figure {self.figure}: no finished run in {' or '.join(self.tables)}; make {target} makes them"


SOURCES = (
    Source(1, ("table5",)),
    Source(2, ("table5", "table3", "sweep_retention")),
    Source(3, ("sweep_retention", "table5", "table3")),
    Source(4, ("table7",)),
)


def drawn(runs: Path, source: Source) -> tuple[str, list[tuple[str, Picture]]]:
    """The first folder that has the figure, and its pictures, each with its group's title; ("", []) if none has it."""
    for table in source.tables:
        layout = LAYOUTS[table]
        if not any((runs / table).glob("*/DONE")):
            continue
        paper = Paper.read(*layout.tables)
        found = []
        for group in by_protocol(read_runs(runs / table, layout.axes)):
            report = report_group(group, paper)
            kept = pictures(report.runs, report.suites, report.costs, paper)
            found += [(report.title, one) for one in kept if one.title.startswith(f"Figure {source.figure}.")]
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
    for source in SOURCES:
        table, found = drawn(runs, source)
        if not found:
            lines.append(source.missing)
        for number, (title, picture) in enumerate(found, start=1):
            file = out / f"figure{source.figure}{f'_{number}' if len(found) > 1 else ''}.png"
            file.write_bytes(picture.png())
            sections.append(Section(f"{LAYOUTS[table].title}: {title}", [], [], [picture]))
            lines.append(f"{file}: from {runs / table}")
    if not sections:
        raise UserError(f"{runs} holds no finished runs of table5, table7 or a sweep; make demo is the quickest to run")
    (out / PAGE).write_text(page("Figures", sections), encoding="utf-8")
    print("\n".join([*lines, str(out / PAGE)]))


if __name__ == "__main__":
    with exits_on_bad_input("figures"):
        tyro.cli(main)
