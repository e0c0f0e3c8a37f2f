"""From runs to a table's numbers: means over seeds, paired differences, standard errors. Fractions, GiB, seconds.

Legend: S seeds, P problems of a suite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from opsd.utils.errors import UserError
from reporting.cells import CellName
from reporting.runs import Run

BASELINE = CellName("all", 1.0)
QUADRANTS = ("q1", "q2", "q3", "q4")


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error over problems, and over seeds if there are several."""

    mean: float
    stderr_problems: float | None
    stderr_seeds: float | None


@dataclass(frozen=True)
class CellStats:
    """One cell on one suite. seeds: the finished runs'. minus_all: paired with the baseline by problem and seed."""

    cell: CellName
    seeds: list[int]
    accuracy: Estimate | None
    minus_all: Estimate | None


@dataclass(frozen=True)
class SuiteReport:
    """One suite's numbers in one group of comparable runs."""

    name: str
    stats: list[CellStats]
    best: list[tuple[CellName, Estimate | None]]
    before: Estimate | None
    teacher: Estimate | None


@dataclass(frozen=True)
class CellCost:
    """What a cell trained on, and its cost: means over seeds.

    kept_frac: fraction of tokens trained on. quadrants: shares of Q1 to Q4, mean over the steps that logged them.
    peak_gib: the largest of the run. step_s: median step. None if it was not logged.
    """

    cell: CellName
    kept_frac: float | None
    quadrants: tuple[float, ...] | None
    peak_gib: float | None
    step_s: float | None


def standard_error(values_N: np.ndarray) -> float | None:
    """Standard error of the mean of independent values: sample deviation / √N; None for fewer than two."""
    return float(values_N.std(ddof=1) / math.sqrt(len(values_N))) if len(values_N) > 1 else None


def estimate(scores_SP: np.ndarray) -> Estimate:
    """The mean over seeds and problems; one axis is averaged before the standard error over the other is taken."""
    return Estimate(
        float(scores_SP.mean()), standard_error(scores_SP.mean(axis=0)), standard_error(scores_SP.mean(axis=1))
    )


def suite_names(group: list[Run]) -> list[str]:
    """The suites that any finished run of the group was evaluated on, in their order."""
    names: dict[str, None] = {}
    for run in group:
        if run.done:
            names |= dict.fromkeys((run.final_evaluation or {"suites": {}})["suites"])
    return list(names)


def cell_stats(group: list[Run], cells: list[CellName], suite: str, baseline: CellName = BASELINE) -> list[CellStats]:
    """Accuracy of every cell on a suite. Raises UserError if runs were evaluated on different problems."""
    scores = {
        (run.cell, run.seed): found
        for run in group
        if run.done and (found := _scores(run.final_evaluation, suite)) is not None
    }
    _same_problems(group, scores, suite)
    stats = []
    for cell in cells:
        seeds = sorted(seed for other, seed in scores if other == cell)
        shared = [seed for seed in seeds if (baseline, seed) in scores]
        difference = None
        if shared and cell != baseline:
            difference = estimate(_stack(scores, cell, shared) - _stack(scores, baseline, shared))
        stats.append(CellStats(cell, seeds, estimate(_stack(scores, cell, seeds)) if seeds else None, difference))
    return stats


def reference(group: list[Run], evaluation: str, suite: str) -> Estimate | None:
    """A model that no cell trained (evaluation "step_0": the start; "teacher"): the same in every run."""
    for run in group:
        scores = _scores(run.evaluation(evaluation), suite)
        if scores is not None:
            return estimate(np.array([list(scores.values())]))
    return None


def cell_costs(group: list[Run], cells: list[CellName]) -> list[CellCost]:
    """What every cell trained on, and its cost."""
    costs = []
    for cell in cells:
        runs = [run for run in group if run.done and run.cell == cell]
        shares = [_mean([_mean(run.logged(f"quadrant/{q}_frac")) for run in runs]) for q in QUADRANTS]
        costs.append(
            CellCost(
                cell,
                kept_frac=_mean([_mean(run.logged("select/kept_frac")) for run in runs]),
                quadrants=None if None in shares else tuple(share for share in shares if share is not None),
                peak_gib=_mean([max(run.logged("mem/peak_gib"), default=None) for run in runs]),
                step_s=_mean([_median(run.logged("time/step_s")) for run in runs]),
            )
        )
    return costs


def best_of(group: list[Run], cells: list[CellName], suite: str) -> list[tuple[CellName, Estimate | None]]:
    """Each cell's best@k: the mean over its seeds, with their standard error."""
    found = []
    for cell in cells:
        evaluations = [run.final_evaluation for run in group if run.done and run.cell == cell]
        suites = [evaluation["suites"].get(suite, {}) for evaluation in evaluations if evaluation is not None]
        values = np.array([one["best@k"] for one in suites if "best@k" in one])
        found.append((cell, Estimate(float(values.mean()), None, standard_error(values)) if len(values) else None))
    return found


def _scores(evaluation: dict[str, Any] | None, suite: str) -> dict[str, float] | None:
    """Per-problem scores in the order of their ids."""
    if evaluation is None or suite not in evaluation["suites"]:
        return None
    return dict(sorted(evaluation["suites"][suite]["scores"].items()))


def _same_problems(group: list[Run], scores: dict[tuple[CellName, int], dict[str, float]], suite: str) -> None:
    problems = {tuple(found) for found in scores.values()}
    if len(problems) > 1:
        folder = group[0].path.parent
        raise UserError(f"runs in {folder} were evaluated on different problems of {suite}; evaluate them anew")


def _stack(scores: dict[tuple[CellName, int], dict[str, float]], cell: CellName, seeds: list[int]) -> np.ndarray:
    return np.array([list(scores[cell, seed].values()) for seed in seeds])


def _mean(values: list[Any]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _median(values: list[float]) -> float | None:
    return float(np.median(values)) if values else None
