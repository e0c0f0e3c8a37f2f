"""A report's tables as text. Percent appear here and in figures only; a missing cell is "-"."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from opsd.utils.markdown import markdown_text
from reporting.cells import CellName
from reporting.paper import BENCHMARKS, MEMORY, MISSING, PAIRS, Paper
from reporting.stats import BASELINE, CellCost, CellStats, Estimate


@dataclass(frozen=True)
class TextTable:
    """Title, column heads and rows of text; the first column is left-aligned."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def rich(self) -> Table:
        """For the terminal."""
        style: dict[str, Any] = {"title_justify": "left", "box": SIMPLE_HEAD, "padding": 0, "show_edge": False}
        # Names are the user's own: as Text, brackets in them are not markup.
        table = Table(title=Text(self.title, "bold"), pad_edge=False, **style)
        for place, column in enumerate(self.columns):
            # Heads may wrap, numbers must not: "18.4 ± 1.8" over two lines cannot be read down a column.
            width = max((len(row[place]) for row in self.rows), default=0)
            table.add_column(Text(column), justify="right" if place else "left", min_width=width, no_wrap=place == 0)
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def show(self, markdown: bool = False) -> None:
        """Print on standard output, for a terminal or as Markdown."""
        if markdown:
            print(self.markdown())
            return
        # As wide as its rows: a narrow terminal would cut off the verdict.
        console = Console(highlight=False)
        console.width = max(console.width, 130)
        console.print(self.rich())

    def markdown(self) -> str:
        """For table.md."""
        heads, *rows = [[markdown_text(cell) for cell in row] for row in (self.columns, *self.rows)]
        rules = [":--", *["--:"] * (len(heads) - 1)]
        lines = [f"| {' | '.join(row)} |" for row in [heads, rules, *rows]]
        return f"**{markdown_text(self.title)}**\n\n" + "\n".join(lines) + "\n"

    def html(self) -> str:
        """For report.html: everything escaped; the paper's columns are marked."""
        theirs = [column.startswith("paper") for column in self.columns]
        marks = [' class="theirs"' if their else "" for their in theirs]
        heads = "".join(
            f'<th scope="col"{mark}>{_lines(column)}</th>' for column, mark in zip(self.columns, marks, strict=True)
        )
        body = "".join(
            f'<tr><th scope="row">{html.escape(row[0])}</th>'
            + "".join(f"<td{mark}>{html.escape(cell)}</td>" for cell, mark in zip(row[1:], marks[1:], strict=True))
            + "</tr>"
            for row in self.rows
        )
        return (
            f'<div class="scroll"><table><caption>{html.escape(self.title)}</caption>'
            f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
        )


def accuracy_table(
    suite: str, stats: list[CellStats], before: Estimate | None, teacher: Estimate | None, paper: Paper
) -> TextTable:
    """Ours on `suite` next to the paper's pairs on the same benchmark (the table's first if it has no such suite).

    Columns for the standard error over seeds appear if any cell has several seeds.
    """
    benchmark, pairs, baseline = paper.benchmark_of(suite), paper.pairs, paper.baseline
    several = any(len(row.seeds) > 1 for row in stats)
    minus = "minus\nall" if baseline == BASELINE else f"minus\n{baseline}"
    ours = ["ours", "± over\nseeds", minus, "± over\nseeds"] if several else ["ours", minus]
    rows = []
    for name, found in (("before training", before), ("teacher", teacher)):
        rows.append([name, _estimate(found), *[""] * (len(ours) - 1 + len(pairs))])
    for row in stats:
        errors = [_seeds(row.accuracy), _seeds(row.minus_all)] if several else ["", ""]
        values = [_estimate(row.accuracy), errors[0], _estimate(row.minus_all, "+"), errors[1]]
        if row.cell == baseline:
            values[2:] = ["", ""]
        theirs = [paper.value(pair, benchmark, row.cell) for pair in pairs]
        rows.append([str(row.cell), *(values if several else values[::2]), *theirs])
    title = f"mean@k, %: ours on {BENCHMARKS.get(suite, suite)}, the paper's on {BENCHMARKS[benchmark]}"
    return TextTable(title, ["", *ours, *[f"paper\n{PAIRS[pair]}" for pair in pairs]], rows)


def others_tables(cells: list[CellName], paper: Paper) -> list[TextTable]:
    """The paper's further benchmarks, one table each, so that it fits a terminal."""
    return [
        TextTable(
            f"The paper on {BENCHMARKS[benchmark]} (mean@16, %)",
            ["", *[PAIRS[pair] for pair in paper.pairs]],
            [[str(cell), *[paper.value(pair, benchmark, cell) for pair in paper.pairs]] for cell in cells],
        )
        for benchmark in paper.benchmarks[1:]
    ]


def best_table(suite: str, best: list[tuple[CellName, Estimate | None]], paper: Paper) -> TextTable:
    """best@k next to Figure 4's: the best of k tries, mean over problems; ± over seeds."""
    benchmark = paper.benchmark_of(suite)
    rows = []
    for cell, found in best:
        theirs = [paper.best_of(pair, benchmark, cell) for pair in paper.pairs]
        rows.append([str(cell), _best(found), *[MISSING if value is None else f"{value:g}" for value in theirs]])
    title = f"best@k, %: ours on {BENCHMARKS.get(suite, suite)}, the paper's Figure 4"
    return TextTable(title, ["", "ours", *[f"paper\n{PAIRS[pair]}" for pair in paper.pairs]], rows)


def cost_table(costs: list[CellCost], paper: Paper) -> TextTable:
    """Tokens trained on, quadrant shares, memory and time; the paper's peak memory if its table states it."""
    pairs = paper.pairs if paper.has_memory else []
    rows = []
    for cost in costs:
        shares = [_percent(share) for share in cost.quadrants] if cost.quadrants else [MISSING] * 4
        memory = MISSING if cost.peak_gib is None else f"{cost.peak_gib:.2f}"
        seconds = MISSING if cost.step_s is None else f"{cost.step_s:.2f}"
        theirs = [paper.value(pair, MEMORY, cost.cell) for pair in pairs]
        rows.append([str(cost.cell), _percent(cost.kept_frac), *shares, memory, seconds, *theirs])
    heads = ["", "tokens\nkept, %", "Q1, %", "Q2, %", "Q3, %", "Q4, %", "peak\nGiB", "step\ns"]
    return TextTable(
        "Tokens trained on, memory and time", [*heads, *[f"paper, GB\n{PAIRS[pair]}" for pair in pairs]], rows
    )


def percent(mean: float, error: float | None, sign: str = "") -> str:
    """A fraction in percent, with its standard error if there is one."""
    return f"{100 * mean:{sign}.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def _lines(text: str) -> str:
    return "<br>".join(html.escape(line) for line in text.split("\n"))


def _estimate(found: Estimate | None, sign: str = "") -> str:
    """Percent with the standard error over problems."""
    return MISSING if found is None else percent(found.mean, found.stderr_problems, sign)


def _best(found: Estimate | None) -> str:
    return MISSING if found is None else percent(found.mean, found.stderr_seeds)


def _seeds(found: Estimate | None) -> str:
    if found is None or found.stderr_seeds is None:
        return MISSING
    return f"{100 * found.stderr_seeds:.1f}"


def _percent(fraction: float | None) -> str:
    return MISSING if fraction is None else f"{100 * fraction:.1f}"
