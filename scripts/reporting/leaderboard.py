"""Rules ranked by what they gain or lose against training on all tokens, retention by retention.

A number is the difference to all tokens, paired by seed and problem; ± combines the errors over problems and over
seeds (`claims.joined_error`), or is the error over problems if there is a single seed.
"""

from __future__ import annotations

import math

from reporting.cells import CellName
from reporting.claims import joined_error
from reporting.paper import MISSING
from reporting.results import Measure, Results
from reporting.stats import BASELINE, CellStats, Estimate
from reporting.tables import TextTable

Gains = dict[CellName, Estimate]
# A report ranks only if there are at least this many rules; fewer can be compared at a glance.
RULES = 4


def gains_of(stats: list[CellStats]) -> Gains:
    """Each measured cell's difference to all tokens."""
    return {row.cell: row.minus_all for row in stats if row.minus_all is not None}


def gains_in(results: Results, measure: str | None = None) -> Gains:
    """The same from a file of results. measure: one of the file's measures; None: its scores."""
    cells = dict.fromkeys(run["cell"] for run in results.values["runs"])
    found = {cell: results.difference(cell, BASELINE.slug, measure) for cell in cells if cell != BASELINE.slug}
    return {CellName.parse(cell): pair[0] for cell, pair in found.items() if pair is not None}


def error_of(gain: Estimate) -> float:
    """One error: combined, or over problems alone; NaN if there is a single problem."""
    joined = joined_error(gain)
    return joined if math.isfinite(joined) else gain.stderr_problems or math.nan


def ranked(gains: Gains) -> bool:
    """Whether there are enough rules to rank."""
    return len({(cell.selector, cell.variant) for cell in gains}) >= RULES


def leaderboard(gains: Gains, measure: Measure) -> TextTable:
    """A row per rule, the best first, by the mean over the retentions at which every ranked rule was run.

    Below, by their own means, are rules that lack one of these retentions, and methods that train on all tokens.
    """
    rules: dict[tuple[str, str], dict[float, Estimate]] = {}
    for cell, gain in gains.items():
        rules.setdefault((cell.selector, cell.variant), {})[cell.retention] = gain
    retentions = sorted({cell.retention for cell in gains}, reverse=True)
    shared = [retention for retention in retentions if retention < 1.0]
    sign = -1.0 if measure.higher_is_better else 1.0

    def place(rule: tuple[str, str]) -> tuple[bool, float]:
        own = rules[rule]
        whole = bool(shared) and all(retention in own for retention in shared)
        return not whole, sign * _mean(own, shared if whole else list(own))

    rows = []
    for rule in sorted(rules, key=place):
        missing, mean = place(rule)
        values = [_shown(rules[rule].get(retention), measure) for retention in retentions]
        rows.append([_name(*rule), MISSING if missing else _number(sign * mean, measure), *values])
    heads = [f"{100 * retention:g} %" for retention in retentions]
    better = "higher" if measure.higher_is_better else "lower"
    title = f"Leaderboard: {measure.name} minus all tokens', {measure.unit} ({better} is better)"
    return TextTable(title, ["", "mean below\n100 %", *heads], rows)


def _mean(own: dict[float, Estimate], retentions: list[float]) -> float:
    return sum(own[retention].mean for retention in retentions) / len(retentions)


def _name(selector: str, variant: str) -> str:
    words = CellName(selector, 1.0, variant).words
    return f"{selector} ({', '.join(words)})" if words else selector


def _shown(gain: Estimate | None, measure: Measure) -> str:
    if gain is None:
        return MISSING
    error = error_of(gain)
    return _number(gain.mean, measure) + ("" if math.isnan(error) else f" ± {measure.scale * error:.{measure.digits}f}")


def _number(value: float, measure: Measure) -> str:
    rounded = round(measure.scale * value, measure.digits) + 0.0  # no −0.0
    return f"{rounded:+.{measure.digits}f}".replace("-", "−")
