"""The paper's claims against our numbers, by a rule that was fixed before the runs.

A claim is about a difference between two cells. Its interval is the mean difference, paired by seed and problem, ± 2
standard errors; the error combines those over problems and over seeds, √(a² + b²): some noise is
counted twice, none is left out.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from opsd.utils.errors import UserError
from reporting.results import Results
from reporting.stats import Estimate

HOLDS, FAILS, OPEN, MISSING = "reproduced", "not reproduced", "inconclusive", "not run"
EXPECTED = ("above", "below", "not_below", "not_above")


@dataclass(frozen=True)
class Claim:
    """cell minus `minus` is expected to be above 0, below 0, not below −margin or not above margin."""

    of: str
    says: str
    data: str
    cell: str
    minus: str
    expected: str


@dataclass(frozen=True)
class Verdict:
    """What our numbers say about a claim. difference: a fraction; None if a cell is missing."""

    claim: Claim
    difference: Estimate | None
    error: float | None
    seeds: list[int]
    word: str


def read_claims(file: Path) -> tuple[list[Claim], float]:
    """The claims and the margin (a fraction). Raises UserError for an unknown expectation."""
    values = json.loads(file.read_text())
    claims = [Claim(**claim) for claim in values["claims"]]
    for claim in claims:
        if claim.expected not in EXPECTED:
            raise UserError(f"{file}: expected {claim.expected!r} is unknown; give one of {', '.join(EXPECTED)}")
    return claims, float(values["margin"])


def judge(claim: Claim, results: dict[str, Results], margin: float) -> Verdict:
    """The claim's verdict on `results` (keyed by the names that claims use)."""
    found = results[claim.data].difference(claim.cell, claim.minus) if claim.data in results else None
    if found is None:
        return Verdict(claim, None, None, [], MISSING)
    difference, seeds = found
    error = joined_error(difference)
    return Verdict(claim, difference, error, seeds, _word(claim.expected, difference.mean, error, margin))


def joined_error(difference: Estimate) -> float:
    """The errors over problems and seeds combined; infinite with a single seed, which says nothing about others."""
    if difference.stderr_problems is None or difference.stderr_seeds is None:
        return math.inf
    return math.hypot(difference.stderr_problems, difference.stderr_seeds)


def _word(expected: str, mean: float, error: float, margin: float) -> str:
    """Reproduced if the whole interval is on the claim's side, not reproduced if all of it is on the other."""
    sign = 1 if expected in ("above", "not_below") else -1
    line = -margin if expected.startswith("not_") else 0.0
    if sign * mean - 2 * error > line:
        return HOLDS
    return FAILS if sign * mean + 2 * error < line else OPEN
