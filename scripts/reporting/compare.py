"""Cells of a file of results against each other, by the rules of docs/questions.md.

The interval of a difference, paired by seed and problem, is its mean ± 2 errors (`claims.joined_error`).
"""

from __future__ import annotations

from itertools import combinations

import numpy as np

from opsd.utils.errors import UserError
from reporting.claims import joined_error
from reporting.leaderboard import signed
from reporting.paper import MISSING
from reporting.results import Measure, Results
from reporting.stats import Estimate, estimate
from reporting.tables import TextTable

BETTER, WORSE, ALIKE, OPEN = "better", "worse", "alike", "inconclusive"
# Two cells are alike if they differ by at most this: as a fraction for scores, or in nats per token.
MARGINS = {"points": 0.02, "nats per token": 0.01}


def compare(results: Results, cells: tuple[str, ...], minus: str | None, name: str | None) -> TextTable:
    """Each of `cells` minus `minus`; if that is None, each minus every later one. name: of the measure."""
    measure = results.measure(name)
    known = list(dict.fromkeys(run["cell"] for run in results.values["runs"]))
    for cell in (*cells, *([] if minus is None else [minus])):
        if cell not in known:
            raise UserError(f"{cell}: no such cell in the file; it has: {', '.join(known)}")
    pairs = list(combinations(cells, 2)) if minus is None else [(cell, minus) for cell in cells if cell != minus]
    rows = []
    for one, other in pairs:
        found = results.difference(one, other, name)
        if found is None:
            rows.append([f"{one} − {other}", MISSING, "0", "not run with a seed of both"])
        else:
            difference, seeds = found
            shown = signed(difference.mean, measure, joined_error(difference))
            rows.append([f"{one} − {other}", shown, str(len(seeds)), verdict(difference, measure)])
    return TextTable(f"{measure.name}, {measure.unit}", ["", "difference", "seeds", "the first is"], rows)


def verdict(difference: Estimate, measure: Measure) -> str:
    """What the whole interval says: better, worse, alike (within the measure's margin), else inconclusive."""
    error = joined_error(difference)
    mean = difference.mean if measure.higher_is_better else -difference.mean
    low, high = mean - 2 * error, mean + 2 * error
    if low > 0:
        return BETTER
    if high < 0:
        return WORSE
    margin = MARGINS.get(measure.unit, 0.0)
    return ALIKE if -margin <= low and high <= margin else OPEN


def means(results: Results, cells: tuple[str, ...], name: str | None, logged: tuple[str, ...]) -> TextTable:
    """Each cell's mean with its error, and its means over steps and seeds of `logged` metrics. name: of the measure."""
    measure, rows = results.measure(name), []
    for cell in cells:
        own = [run for run in results.values["runs"] if run["cell"] == cell]
        of_cell = estimate(results.scores_SP(cell, results.seeds(cell), name))
        mean, error = (f"{measure.scale * value:.{measure.digits}f}" for value in (of_cell.mean, joined_error(of_cell)))
        values = [[run[metric] for run in own if run.get(metric) is not None] for metric in logged]
        shown = [f"{np.mean(found):.3f}" if found else MISSING for found in values]
        rows.append([cell, mean if error == "inf" else f"{mean} ± {error}", str(len(own)), *shown])
    return TextTable(f"Means of {measure.name}, {measure.unit}", ["", "mean", "seeds", *logged], rows)
