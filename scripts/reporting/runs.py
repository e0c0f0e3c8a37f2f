"""Run folders to plain values: what was set, what each step logged, what each evaluation found."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from opsd.errors import UserError

# What may differ between runs that one table compares; everything else is the protocol they share.
NOT_PROTOCOL = frozenset({"out", "seed", "select", "track", "checkpoint", "telemetry"})


@dataclass(frozen=True)
class CellName:
    """One row of a table: a selection rule at a retention (fraction of tokens kept)."""

    selector: str
    retention: float

    def __str__(self) -> str:
        return self.selector if self.selector == "all" else f"{self.selector} {100 * self.retention:g} %"


@dataclass(frozen=True)
class Run:
    """One run folder. config: config.json as it is. done: whether the run finished."""

    path: Path
    config: dict[str, Any]
    done: bool

    @property
    def cell(self) -> CellName:
        """The table row this run belongs to."""
        select = self.config["select"]
        return CellName(select["by"], 1.0 if select["by"] == "all" else float(select["retention"]))

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.config["seed"])

    @property
    def protocol(self) -> str:
        """Everything that must be equal for two runs to be compared, as canonical JSON."""
        return json.dumps({k: v for k, v in self.config.items() if k not in NOT_PROTOCOL}, sort_keys=True)

    @cached_property
    def steps(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl. Raises UserError for a line that is not JSON."""
        file = self.path / "metrics.jsonl"
        if not file.is_file():
            raise UserError(f"{self.path} is marked as finished but has no metrics.jsonl; run it again")
        return [
            _json(line, f"{file} line {number}") for number, line in enumerate(file.read_text().splitlines(), start=1)
        ]

    def evaluation(self, name: str) -> dict[str, Any] | None:
        """eval/NAME.json, or None where there is none."""
        file = self.path / "eval" / f"{name}.json"
        return _json(file.read_text(), str(file)) if file.is_file() else None

    @property
    def final_evaluation(self) -> dict[str, Any] | None:
        """The evaluation after the last step."""
        return self.evaluation(f"step_{self.config['steps']}")

    def logged(self, key: str) -> list[float]:
        """The values of a metric in the steps that have it."""
        return [line[key] for line in self.steps if key in line]


def read_runs(folder: Path) -> list[Run]:
    """The run folders directly under `folder`, by name. Raises UserError where there is none."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give the folder that holds the run folders")
    runs = []
    for file in sorted(folder.glob("*/config.json")):
        config = _json(file.read_text(), str(file))
        if "select" not in config or "steps" not in config:
            raise UserError(f"{file} is no run's configuration; move its folder out of {folder}")
        runs.append(Run(file.parent, config, (file.parent / "DONE").exists()))
    if not runs:
        raise UserError(f"{folder} holds no run folder (with a config.json); run a recipe first")
    return runs


def by_protocol(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs that may be compared with each other, together. Raises UserError for the same cell and seed twice."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        group = groups.setdefault(run.protocol, [])
        for other in group:
            if (other.cell, other.seed) == (run.cell, run.seed):
                raise UserError(f"{other.path} and {run.path} are the same cell and seed; move one of them away")
        group.append(run)
    return list(groups.values())


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error})") from error
