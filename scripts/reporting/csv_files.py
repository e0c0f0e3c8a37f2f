"""table.csv: every number of a report, ours and the paper's, one per row: fractions, GiB, seconds, or empty."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from reporting.cells import CellName
from reporting.paper import Paper
from reporting.stats import QUADRANTS, CellCost, CellStats

COLUMNS = [
    *("source", "models", "benchmark", "selector", "retention", "variant", "quantity", "value", "unit"),
    *("stderr_problems", "stderr_seeds", "std_as_printed", "seeds"),
]


def write_csv(rows: list[dict[str, Any]], file: Path) -> None:
    """Write the rows, with COLUMNS as the header."""
    pd.DataFrame(rows, columns=COLUMNS, dtype=object).to_csv(file, index=False)


def our_rows(models: str, suites: list[tuple[str, list[CellStats]]], costs: list[CellCost]) -> Iterator[dict[str, Any]]:
    """One row per cell and quantity that was measured."""
    ours = {"source": "ours", "models": models}
    for suite, stats in suites:
        for row in stats:
            for quantity, found in (("mean@k", row.accuracy), ("mean@k minus baseline", row.minus_all)):
                if found is not None:
                    values = {"quantity": quantity, "value": found.mean, "unit": "fraction", "seeds": len(row.seeds)}
                    yield {**ours, "benchmark": suite, **asdict(row.cell), **asdict(found), **values}
    for cost in costs:
        quadrants = zip(QUADRANTS, cost.quadrants or (None,) * len(QUADRANTS), strict=True)
        values = {
            "kept": (cost.kept_frac, "fraction"),
            **{f"{name} share": (share, "fraction") for name, share in quadrants},
            "peak memory": (cost.peak_gib, "GiB"),
            "step": (cost.step_s, "s"),
        }
        for quantity, (value, unit) in values.items():
            if value is not None:
                yield {**ours, **asdict(cost.cell), "quantity": quantity, "value": value, "unit": unit}


def paper_rows(paper: Paper) -> Iterator[dict[str, Any]]:
    """The paper's rows, percent converted to fractions."""
    for row in [*paper.rows, *paper.best]:
        percent = row["unit"] == "percent"
        scaled = {name: float(row[name]) / (100 if percent else 1) if row[name] else "" for name in ("value", "std")}
        yield {
            **{"source": "paper", "models": row["pair"], "benchmark": row["benchmark"]},
            **asdict(CellName(row["method"], float(row["retention"]))),
            "quantity": row["statistic"],
            "value": scaled["value"],
            "unit": "fraction" if percent else row["unit"],
            "std_as_printed": scaled["std"],
        }
