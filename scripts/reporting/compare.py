"""Cells of a file of results against each other, by the rules of docs/questions.md.

The interval of a difference, paired by seed and problem, is its mean ± 2 errors (`claims.joined_error`).
"""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np

from opsd.utils.errors import UserError
from reporting.claims import joined_error
from reporting.paper import MISSING
from reporting.results import Measure, Results
from reporting.stats import Estimate
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
            rows.append([f"{one} − {other}", _shown(found[0], measure), str(len(found[1])), verdict(found[0], measure)])
    return TextTable(f"{measure.name}, {measure.unit}", ["", "difference", "seeds", "the first is"], rows)


def verdict(difference: Estimate, measure: Measure) -> str:
    """What the whole interval says: better, worse, alike (within the measure's margin), else inconclusive."""
    error = joined_error(difference)
    low, high = sorted(
        (1 if measure.higher_is_better else -1) * (difference.mean + side * 2 * error) for side in (-1, 1)
    )
    if low > 0:
        return BETTER
    if high < 0:
        return WORSE
    margin = MARGINS.get(measure.unit, 0.0)
    return ALIKE if -margin <= low and high <= margin else OPEN


def logged(results: Results, cells: tuple[str, ...], names: tuple[str, ...]) -> TextTable:
    """Means over steps and seeds of logged metrics."""
    rows = []
    for cell in cells:
        own = [run for run in results.values["runs"] if run["cell"] == cell]
        values = [[run[name] for run in own if run.get(name) is not None] for name in names]
        rows.append([cell, *(f"{np.mean(found):.3f}" if found else MISSING for found in values)])
    return TextTable("Logged means over steps and seeds", ["", *names], rows)


def _shown(difference: Estimate, measure: Measure) -> str:
    error = joined_error(difference)
    mean = f"{round(measure.scale * difference.mean, measure.digits) + 0.0:+.{measure.digits}f}".replace("-", "−")
    return mean + (f" ± {measure.scale * error:.{measure.digits}f}" if math.isfinite(error) else "")
