"""What a report's runs can and cannot show, in sentences made from the runs themselves."""

from __future__ import annotations

from reporting.cells import CellName
from reporting.paper import BENCHMARKS
from reporting.runs import Run
from reporting.stats import BASELINE, CellStats


def remarks(group: list[Run], suites: list[str], stats: list[CellStats], baseline: CellName = BASELINE) -> list[str]:
    """One or two sentences per line. stats: of the first suite; differences are to `baseline`."""
    seeds = max((len(row.seeds) for row in stats), default=0)
    lines = []
    waiting = [run.path.name for run in group if not run.done]
    if waiting:
        lines.append(f"Not finished, so not counted: {', '.join(waiting)}.")
    lines += _verdicts(stats, baseline)
    if seeds == 1:
        lines.append(
            "One seed: ± is the standard error over problems. It does not include the variation between seeds, so a "
            'difference of a few ± may be chance; SEEDS="0 1 2" measures it.'
        )
    elif seeds > 1:
        lines.append("± is the standard error over problems; the next column gives it over seeds.")
    if any(suite not in BENCHMARKS for suite in suites):
        lines.append(
            "This can show whether training on fewer tokens keeps what training on all of them gains, and which rule "
            "keeps more, on this task and these models. It cannot show the paper's accuracies: task and models differ."
        )
    lines.append(
        "The paper's ± is as printed; the paper does not say what it measures. "
        "All rows share problems and sampling seed."
    )
    lines.append(
        "Q1 unsure and disagreeing with the teacher, Q2 unsure and agreeing, Q3 sure and disagreeing, Q4 sure and "
        "agreeing. Memory is the training process's peak, models and libraries included."
    )
    return lines


def _verdicts(stats: list[CellStats], baseline: CellName) -> list[str]:
    """Each cell against the baseline: beyond two standard errors (the larger kind), or not distinguishable."""
    name = "all tokens" if baseline == BASELINE else str(baseline)
    found: dict[str, list[str]] = {f"above {name}": [], f"below {name}": [], f"not distinguishable from {name}": []}
    for row in stats:
        if row.minus_all is None or row.minus_all.stderr_problems is None:
            continue
        error = max(row.minus_all.stderr_problems, row.minus_all.stderr_seeds or 0.0)
        if abs(row.minus_all.mean) <= 2 * error:
            found[f"not distinguishable from {name}"].append(str(row.cell))
        else:
            found[f"{'above' if row.minus_all.mean > 0 else 'below'} {name}"].append(str(row.cell))
    text = "; ".join(f"{what}: {', '.join(cells)}" for what, cells in found.items() if cells)
    return [f"By two standard errors of the paired difference, {text}."] if text else []
