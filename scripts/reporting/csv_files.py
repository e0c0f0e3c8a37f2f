"""table.csv: every number of a report, ours and the paper's, one a row; fractions, GiB, seconds; empty if missing."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reporting.paper import Paper
from reporting.runs import CellName
from reporting.stats import CellCost, CellStats

COLUMNS: tuple[str, ...] = (
    "source",
    "models",
    "benchmark",
    "selector",
    "retention",
    "variant",
    "quantity",
    "value",
    "unit",
    "stderr_problems",
    "stderr_seeds",
    "std_as_printed",
    "seeds",
)


def write_csv(rows: list[dict[str, Any]], file: Path) -> None:
    """The rows under COLUMNS."""
    with file.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, list(COLUMNS), restval="")
        writer.writeheader()
        writer.writerows(rows)


def our_rows(models: str, suites: list[tuple[str, list[CellStats]]], costs: list[CellCost]) -> Iterator[dict[str, Any]]:
    """One row a cell and quantity that was measured."""
    for suite, stats in suites:
        for row in stats:
            for quantity, found in (("mean@k", row.accuracy), ("mean@k minus baseline", row.minus_all)):
                if found is not None:
                    yield {
                        **_place("ours", models, suite, row.cell),
                        "quantity": quantity,
                        "value": found.mean,
                        "unit": "fraction",
                        "stderr_problems": found.stderr_problems,
                        "stderr_seeds": found.stderr_seeds,
                        "seeds": len(row.seeds),
                    }
    for cost in costs:
        quadrants = cost.quadrants or (None,) * 4
        values = {
            "kept": (cost.kept_frac, "fraction"),
            **{f"q{number} share": (share, "fraction") for number, share in enumerate(quadrants, start=1)},
            "peak memory": (cost.peak_gib, "GiB"),
            "step": (cost.step_s, "s"),
        }
        for quantity, (value, unit) in values.items():
            if value is not None:
                yield {**_place("ours", models, "", cost.cell), "quantity": quantity, "value": value, "unit": unit}


def paper_rows(paper: Paper) -> Iterator[dict[str, Any]]:
    """The paper's rows, percent made fractions."""
    for row in [*paper.rows, *paper.best]:
        percent = row["unit"] == "percent"
        scaled = {name: float(row[name]) / (100 if percent else 1) if row[name] else "" for name in ("value", "std")}
        yield {
            **_place("paper", row["pair"], row["benchmark"], CellName(row["method"], float(row["retention"]))),
            "quantity": row["statistic"],
            "value": scaled["value"],
            "unit": "fraction" if percent else row["unit"],
            "std_as_printed": scaled["std"],
        }


def _place(source: str, models: str, benchmark: str, cell: CellName) -> dict[str, Any]:
    return {
        "source": source,
        "models": models,
        "benchmark": benchmark,
        "selector": cell.selector,
        "retention": cell.retention,
        "variant": cell.variant,
    }
