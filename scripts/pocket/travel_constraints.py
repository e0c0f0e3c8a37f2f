#!/usr/bin/env python
"""Table 7 in full: Avg@k and Best@k of each cell with standard errors, and the share of episodes that satisfy each
constraint, from the run folders' last evaluations.

    python scripts/pocket/travel_constraints.py runs/table7 --out runs/table7/report

Prints the table and writes constraints.md. Several seeds of a cell are averaged; ± is the standard error over trips.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from opsd.utils.errors import UserError, exits_on_bad_input
from reporting.runs import Run, read_runs
from reporting.tables import TextTable, percent

Shares = dict[str, dict[str, float]]
"""One evaluation: mean and (with several trips) stderr_problems of avg@k, best@k and each constraint."""


def shares_of(evaluation: dict[str, Any] | None) -> dict[str, Shares]:
    """The numbers of every suite of an evaluation that has constraints."""
    suites = {} if evaluation is None else evaluation["suites"]
    return {name: _shares(suite) for name, suite in suites.items() if "constraints" in suite}


def _shares(suite: dict[str, Any]) -> Shares:
    k = suite["k"]
    errors = {"avg": suite["stderr_problems"], "best": suite["stderr_best"]}
    means = {"avg": suite["mean@k"], "best": suite["best@k"]}
    whole = {
        f"{name}@{k}": {"mean": mean, **({} if errors[name] is None else {"stderr_problems": errors[name]})}
        for name, mean in means.items()
    }
    return {**whole, **suite["constraints"]}


def rows_of(runs: list[Run], suite: str) -> dict[str, list[Shares]]:
    """Row heads to one Shares per seed: before training, the teacher, then the cells in the order of their folders."""
    rows: dict[str, list[Shares]] = {}
    for head, name in (("before training", "step_0"), ("teacher", "teacher")):
        found = [shares_of(run.evaluation(name)).get(suite) for run in runs]
        rows[head] = [shares for shares in found if shares is not None][:1]
    for run in runs:
        shares = shares_of(run.final_evaluation).get(suite)
        if run.done and shares is not None:
            rows.setdefault(str(run.cell), []).append(shares)
    return {head: found for head, found in rows.items() if found}


def table_of(runs: list[Run], suite: str) -> TextTable:
    """The table of one suite; percent."""
    rows = rows_of(runs, suite)
    keys = list(dict.fromkeys(key for found in rows.values() for shares in found for key in shares))
    lines = [
        [head, *(_cell([shares[key] for shares in found if key in shares]) for key in keys)]
        for head, found in rows.items()
    ]
    return TextTable(
        f"Fraction of constraints on {suite}, and each by itself, %",
        ["", *(key.replace("_", " ") for key in keys)],
        lines,
    )


def _cell(entries: list[dict[str, float]]) -> str:
    """Mean over seeds; seeds share their trips, so the error over trips is the largest of any seed."""
    if not entries:
        return "-"
    mean = sum(entry["mean"] for entry in entries) / len(entries)
    errors = [entry["stderr_problems"] for entry in entries if "stderr_problems" in entry]
    return percent(mean, max(errors, default=None))


def main(runs: Annotated[Path, tyro.conf.Positional], out: Path) -> None:
    """Avg@k and Best@k, and the share of each cell's episodes that satisfies each constraint.

    Args:
        runs: Folder that holds the run folders.
        out: Folder to write constraints.md to.
    """
    found = read_runs(runs)
    suites = sorted({suite for run in found for suite in shares_of(run.final_evaluation)})
    if not suites:
        raise UserError(f"{runs} holds no evaluated run with constraints; run recipes/table7_agentic.sh first")
    out.mkdir(parents=True, exist_ok=True)
    tables = [table_of(found, suite) for suite in suites]
    (out / "constraints.md").write_text("\n".join(table.markdown() for table in tables))
    for table in tables:
        table.show()


if __name__ == "__main__":
    with exits_on_bad_input("travel_constraints"):
        tyro.cli(main)
