"""A report's tables and remarks as text. Percent appear here and in figures only; a missing cell is "-"."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from report_runs import CellName, Run
from report_stats import BASELINE, CellCost, CellStats, Estimate
from rich.box import SIMPLE_HEAD
from rich.table import Table

MISSING = "-"
BENCHMARKS = {"math500": "MATH-500", "aime24": "AIME 2024", "aime25": "AIME 2025"}
PAIRS = {"qwen3": "Qwen3\n8B → 4B", "llama": "Llama\n70B → 8B", "qwen25": "Qwen2.5\n14B → 1.5B"}


@dataclass(frozen=True)
class TextTable:
    """Title, column heads and rows of text; the first column is left-aligned."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def rich(self) -> Table:
        """For the terminal."""
        table = Table(title=self.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
        for place, column in enumerate(self.columns):
            table.add_column(column, justify="right" if place else "left", no_wrap=place == 0)
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """For table.md."""
        heads = [column.replace("\n", " ") for column in self.columns]
        rules = [":--", *["--:"] * (len(heads) - 1)]
        lines = [f"| {' | '.join(row)} |" for row in [heads, rules, *self.rows]]
        return f"**{self.title}**\n\n" + "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Paper:
    """The paper's numbers: one table's rows of assets/paper/tables.csv, each a dict of its columns."""

    rows: list[dict[str, str]]

    @classmethod
    def read(cls, file: Path, table: str) -> Paper:
        """The rows of `table`, e.g. table5."""
        with file.open(newline="") as lines:
            return cls([row for row in csv.DictReader(lines) if row["table"] == table])

    @property
    def cells(self) -> list[CellName]:
        """The table's cells in the paper's order."""
        return list(dict.fromkeys(CellName(row["method"], float(row["retention"])) for row in self.rows))

    def value(self, pair: str, benchmark: str, cell: CellName) -> str:
        """One number with the paper's ±, percent as printed there, or "-"."""
        for row in self.rows:
            if (row["pair"], row["benchmark"]) != (pair, benchmark):
                continue
            if CellName(row["method"], float(row["retention"])) == cell:
                return f"{row['value']} ± {row['std']}" if row["std"] else row["value"]
        return MISSING


def accuracy_table(
    suite: str, stats: list[CellStats], before: Estimate | None, teacher: Estimate | None, paper: Paper
) -> TextTable:
    """Ours on `suite` beside the paper's pairs on the same benchmark (MATH-500 where the paper has no such suite).

    Columns for the standard error over seeds appear where some cell has several seeds.
    """
    benchmark = suite if suite in BENCHMARKS else "math500"
    several = any(len(row.seeds) > 1 for row in stats)
    ours = ["ours", "± over\nseeds", "minus\nall", "± over\nseeds"] if several else ["ours", "minus\nall"]
    rows = []
    for name, found in (("before training", before), ("teacher", teacher)):
        rows.append([name, _estimate(found), *[""] * (len(ours) - 1 + len(PAIRS))])
    for row in stats:
        errors = [_seeds(row.accuracy), _seeds(row.minus_all)] if several else ["", ""]
        values = [_estimate(row.accuracy), errors[0], _estimate(row.minus_all, "+"), errors[1]]
        if row.cell == BASELINE:
            values[2:] = ["", ""]
        theirs = [paper.value(pair, benchmark, row.cell) for pair in PAIRS]
        rows.append([str(row.cell), *(values if several else values[::2]), *theirs])
    title = f"mean@k, %: ours on {BENCHMARKS.get(suite, suite)}, the paper's on {BENCHMARKS[benchmark]}"
    return TextTable(title, ["", *ours, *[f"paper\n{name}" for name in PAIRS.values()]], rows)


def aime_table(cells: list[CellName], paper: Paper) -> TextTable:
    """The paper's other two benchmarks."""
    columns = [(benchmark, pair) for benchmark in ("aime24", "aime25") for pair in PAIRS]
    heads = ["", *[f"{BENCHMARKS[benchmark]}\n{PAIRS[pair]}" for benchmark, pair in columns]]
    rows = [[str(cell), *[paper.value(pair, benchmark, cell) for benchmark, pair in columns]] for cell in cells]
    return TextTable("The paper on AIME (mean@16, %)", heads, rows)


def cost_table(costs: list[CellCost]) -> TextTable:
    """Tokens trained on, quadrant shares, memory and time."""
    rows = []
    for cost in costs:
        shares = [_percent(share) for share in cost.quadrants] if cost.quadrants else [MISSING] * 4
        memory = MISSING if cost.peak_gib is None else f"{cost.peak_gib:.2f}"
        seconds = MISSING if cost.step_s is None else f"{cost.step_s:.2f}"
        rows.append([str(cost.cell), _percent(cost.kept_frac), *shares, memory, seconds])
    heads = ["", "tokens\nkept, %", "Q1, %", "Q2, %", "Q3, %", "Q4, %", "peak\nGiB", "step\ns"]
    return TextTable("What was trained on, and what it took", heads, rows)


def remarks(group: list[Run], suites: list[str], stats: list[CellStats]) -> list[str]:
    """What these runs can and cannot show, from the runs themselves. `stats` are those of the first suite."""
    seeds = max((len(row.seeds) for row in stats), default=0)
    lines = []
    waiting = [run.path.name for run in group if not run.done]
    if waiting:
        lines.append(f"Not finished, so not counted: {', '.join(waiting)}.")
    lines += _verdicts(stats)
    if seeds == 1:
        lines.append(
            "One seed: ± is the standard error over problems. How far another seed would land is not in it, so a "
            'difference of a few ± may be chance; SEEDS="0 1 2" measures it.'
        )
    elif seeds > 1:
        lines.append("± is the standard error over problems; over seeds in the column after it.")
    if any(suite not in BENCHMARKS for suite in suites):
        lines.append(
            "It can show: whether training on fewer tokens keeps what training on all of them gains, and which rule "
            "keeps more, on this task and these models. It cannot show the paper's accuracies: task and models differ."
        )
    lines.append(
        "The paper's ± is as printed there; it does not say what it is. Every row shares problems and sampling."
    )
    lines.append(
        "Q1 unsure and disagreeing with the teacher, Q2 unsure and agreeing, Q3 sure and disagreeing, Q4 sure and "
        "agreeing. Memory is the training process's peak, models and libraries included."
    )
    return lines


def _verdicts(stats: list[CellStats]) -> list[str]:
    """Each cell against `all`: beyond two standard errors (the larger of the two kinds), or not told apart."""
    found: dict[str, list[str]] = {"above all tokens": [], "below all tokens": [], "not told apart from all tokens": []}
    for row in stats:
        if row.minus_all is None or row.minus_all.stderr_problems is None:
            continue
        error = max(row.minus_all.stderr_problems, row.minus_all.stderr_seeds or 0.0)
        if abs(row.minus_all.mean) <= 2 * error:
            found["not told apart from all tokens"].append(str(row.cell))
        else:
            found["above all tokens" if row.minus_all.mean > 0 else "below all tokens"].append(str(row.cell))
    text = "; ".join(f"{what}: {', '.join(cells)}" for what, cells in found.items() if cells)
    return [f"By two standard errors of the paired difference, {text}."] if text else []


def _estimate(found: Estimate | None, sign: str = "") -> str:
    """Percent with the standard error over problems."""
    if found is None:
        return MISSING
    error = "" if found.stderr_problems is None else f" ± {100 * found.stderr_problems:.1f}"
    return f"{100 * found.mean:{sign}.1f}{error}"


def _seeds(found: Estimate | None) -> str:
    if found is None or found.stderr_seeds is None:
        return MISSING
    return f"{100 * found.stderr_seeds:.1f}"


def _percent(fraction: float | None) -> str:
    return MISSING if fraction is None else f"{100 * fraction:.1f}"
