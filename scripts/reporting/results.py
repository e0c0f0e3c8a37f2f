"""Results as one small file: every run's score on every problem, and the origin of the runs.

Legend: S seeds, P problems.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opsd.utils.errors import UserError
from reporting.runs import Run, read_runs
from reporting.stats import QUADRANTS, Estimate, estimate

# Names of run folders made by recipes: PAIR-CELL-seedN.
_NAME = re.compile(r"(?P<pair>[a-z0-9]+)-(?P<cell>.+)-seed(?P<seed>\d+)")
# Metrics whose means are stored with the scores.
LOGGED = {
    "kept_frac": "select/kept_frac",
    "student_entropy_nats": "student/entropy_nats",
    "teacher_entropy_nats": "teacher/entropy_nats",
    **{f"{q}_frac": f"quadrant/{q}_frac" for q in QUADRANTS},
    "q3_kept_frac": "quadrant/q3_kept_frac",
    "jaccard_entropy": "select/jaccard_entropy",
}


@dataclass(frozen=True)
class Measure:
    """What cells are compared by. scale: factor from a value to its `unit`. digits: shown decimals."""

    name: str = "mean@k"
    unit: str = "points"
    scale: float = 100.0
    digits: int = 1
    higher_is_better: bool = True


@dataclass(frozen=True)
class Results:
    """values: the file as JSON values; see `collect`."""

    values: dict[str, Any]

    @classmethod
    def read(cls, file: Path) -> Results:
        """Read a file that `collect` made. Raises UserError if it cannot be read."""
        try:
            values = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read ({error}); make it with scripts/results.py collect") from error
        if not isinstance(values, dict) or "runs" not in values:
            raise UserError(f"{file} holds no results; make it with scripts/results.py collect")
        return cls(values)

    def measure(self, name: str | None) -> Measure:
        """One of the file's `measures`; None: its scores. Raises UserError if it has none of that name."""
        if name is None and all("scores" in run for run in self.values["runs"]):
            return Measure()
        known = self.values.get("measures", {})
        if name is None or name not in known:
            names = ", ".join(known) or "no measures besides its scores"
            raise UserError(f"--measure {name or ''}: give one that the file has: {names}")
        return Measure(name, **known[name])

    def seeds(self, cell: str) -> list[int]:
        """The seeds that `cell` was run with."""
        return sorted(run["seed"] for run in self.values["runs"] if run["cell"] == cell)

    def scores_SP(self, cell: str, seeds: list[int], measure: str | None = None) -> np.ndarray:
        """Scores [S, P] of `cell`, fractions, in the order of `seeds` and of the file's problems.

        measure: one of the file's `measures` instead, in its unit.
        """
        own = {run["seed"]: run for run in self.values["runs"] if run["cell"] == cell}
        return np.array([own[seed]["scores"] if measure is None else own[seed]["measures"][measure] for seed in seeds])

    def difference(self, cell: str, minus: str, measure: str | None = None) -> tuple[Estimate, list[int]] | None:
        """`cell` minus `minus`, paired by seed and problem, and the seeds that both have; None if there are none."""
        seeds = [seed for seed in self.seeds(cell) if seed in self.seeds(minus)]
        if not seeds:
            return None
        return estimate(self.scores_SP(cell, seeds, measure) - self.scores_SP(minus, seeds, measure)), seeds


def collect(folder: Path, commit: str, command: str) -> dict[str, Any]:
    """All finished runs under `folder`. Raises UserError if they were made or evaluated in different ways.

    command: the one that made them. Scores are fractions of k samples, rounded to 6 digits, in the order of `problems`.
    """
    finished = [run for run in read_runs(folder) if run.done and run.final_evaluation is not None]
    if not finished:
        raise UserError(f"{folder} holds no finished run with an evaluation; run a recipe first")
    suite = next(iter((finished[0].final_evaluation or {})["suites"]))
    problems = list(_scores(finished[0], f"step_{finished[0].config['steps']}", suite))
    runs = []
    for run in finished:
        name = _NAME.fullmatch(run.path.name)
        if name is None:
            raise UserError(f"{run.path} is not named as recipes name runs (PAIR-CELL-seedN); move it away")
        scores = _scores(run, f"step_{run.config['steps']}", suite)
        if list(scores) != problems:
            raise UserError(f"{run.path} was evaluated on other problems than {finished[0].path}")
        means = {key: _mean(run.logged(metric)) for key, metric in LOGGED.items()}
        runs.append({"cell": name["cell"], "seed": run.seed, **means, "scores": _rounded(scores)})
    runs.sort(key=lambda run: (run["cell"], run["seed"]))
    first = finished[0]
    return {
        "commit": commit,
        "command": command,
        "suite": suite,
        "samples": first.config["eval"]["samples"],
        "steps": first.config["steps"],
        "before": _rounded(_scores(first, "step_0", suite)),
        "teacher": _rounded(_scores(first, "teacher", suite)),
        "problems": problems,
        "runs": runs,
    }


def with_earlier(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """`collect`'s values plus the runs of an earlier file that they lack; `earlier` records the origin of these.

    Raises UserError if the file's runs were trained or evaluated in another way.
    """
    old = Results.read(file).values
    for name in ("suite", "samples", "steps", "before", "teacher", "problems"):
        if old.get(name) != values[name]:
            raise UserError(f"{file}: its runs have another {name!r} than those of the folder; give a file of the same")
    there = {(run["cell"], run["seed"]) for run in values["runs"]}
    more = [run for run in old["runs"] if (run["cell"], run["seed"]) not in there]
    source = {"commit": old["commit"], "command": old["command"], "cells": sorted({run["cell"] for run in more})}
    runs = sorted([*values["runs"], *more], key=lambda run: (run["cell"], run["seed"]))
    return values | {"earlier": [*values.get("earlier", []), source], "runs": runs}


def write_results(file: Path, head: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    """Write a file of results: one line for what all runs share, then one per run."""
    rows = ",\n".join("  " + json.dumps(run) for run in runs)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'{json.dumps(head)[:-1]}, "runs": [\n{rows}\n]}}\n')


def _scores(run: Run, evaluation: str, suite: str) -> dict[str, float]:
    found = run.evaluation(evaluation)
    return {} if found is None else dict(sorted(found["suites"][suite]["scores"].items()))


def _rounded(scores: dict[str, float]) -> list[float]:
    return [round(score, 6) for score in scores.values()]


def _mean(values: list[float]) -> float | None:
    return round(float(np.mean(values)), 6) if values else None
