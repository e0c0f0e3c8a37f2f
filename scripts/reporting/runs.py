"""Run folders as plain values: settings, metrics of each step, results of each evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from opsd.config import TeacherConfig, TrainConfig, to_json
from opsd.utils.errors import UserError
from reporting.cells import AXES, CellName, off_axes

# Settings that may differ between runs that one table compares; all others are the protocol they share.
NOT_PROTOCOL = frozenset({"out", "seed", "select", "track", "checkpoint", "telemetry", "health", "began"})


@dataclass(frozen=True)
class Run:
    """One run folder. config: config.json as it is. done: whether the run finished.

    axes: which of AXES a row may differ in; a difference along any other axis is another protocol.
    """

    path: Path
    config: dict[str, Any]
    done: bool
    axes: tuple[str, ...] = ()

    @property
    def cell(self) -> CellName:
        """The table row this run belongs to."""
        return CellName.of(self.config, self.axes)

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.config["seed"])

    @property
    def protocol(self) -> str:
        """Everything that must be equal for two runs to be compared, as canonical JSON."""
        return json.dumps(_comparable(self.config), sort_keys=True)

    @property
    def shared(self) -> str:
        """The protocol without the settings that make up the axes."""
        values = _comparable(self.config)
        for axis in self.axes:
            part, names = AXES[axis]
            values[part] = {name: value for name, value in values[part].items() if name not in names}
        return json.dumps(values, sort_keys=True)

    @property
    def varies(self) -> bool:
        """Whether the run differs from the protocol along one of the axes."""
        return bool(off_axes(self.config, self.axes))

    @cached_property
    def steps(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl. Raises UserError for a line that is not JSON."""
        file = self.path / "metrics.jsonl"
        if not file.is_file():
            if not self.done:
                raise UserError(f"{self.path} has trained no step yet; continue with opsd train --resume {self.path}")
            raise UserError(f"{self.path} is marked as finished but has no metrics.jsonl; run it again")
        return [
            _json(line, f"{file} line {number}") for number, line in enumerate(file.read_text().splitlines(), start=1)
        ]

    def evaluation(self, name: str) -> dict[str, Any] | None:
        """eval/NAME.json, or None; for a teacher without one, the evaluation that `opsd eval` left beside the runs."""
        file = self.path / "eval" / f"{name}.json"
        if file.is_file():
            return _json(file.read_text(), str(file))
        return self._evaluated_teacher() if name == "teacher" else None

    def _evaluated_teacher(self) -> dict[str, Any] | None:
        """The evaluation of this run's teacher, with this run's sampling settings, from teachers/ beside the run."""
        evaluated = {**_DEFAULTS["eval"], **self.config.get("eval", {})}
        suites = {pair.split("=", 1)[0] for pair in evaluated["suite"]}
        sampling = {name: evaluated[name] for name in ("samples", "temperature", "top_p", "top_k")}
        for file in sorted((self.path.parent / "teachers").glob("*.json")):
            found = _json(file.read_text(), str(file))
            of_ours = found.get("model") == self.config["teacher"]["model"] and suites <= found.get("suites", {}).keys()
            if of_ours and sampling.items() <= found["sampling"].items():
                return found
        return None

    @property
    def final_evaluation(self) -> dict[str, Any] | None:
        """The evaluation after the last step."""
        return self.evaluation(f"step_{self.config['steps']}")

    def logged(self, key: str) -> list[float]:
        """The values of a metric in the steps that have it."""
        return [line[key] for line in self.steps if key in line]


def read_run(folder: Path, axes: tuple[str, ...] = ()) -> Run:
    """Read a run folder. Raises UserError if its config.json is not a run's."""
    file = folder / "config.json"
    config = _json(file.read_text(), str(file))
    if not isinstance(config, dict) or "select" not in config or "steps" not in config:
        raise UserError(f"{file} is not a run's configuration; give another folder, or move it out of {folder.parent}")
    return Run(folder, config, (folder / "DONE").exists(), axes)


def read_runs(folder: Path, axes: tuple[str, ...] = ()) -> list[Run]:
    """The run folders directly under `folder`, by name; rows may differ along `axes`. UserError if there is none."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder that holds the run folders")
    runs = [read_run(file.parent, axes) for file in sorted(folder.glob("*/config.json"))]
    if not runs:
        raise UserError(f"{folder} holds no run folder (with a config.json); run a recipe first")
    return runs


def by_protocol(runs: Iterable[Run]) -> list[list[Run]]:
    """Groups of runs that may be compared with each other. Raises UserError for the same cell and seed twice.

    A run that differs from the protocol along an axis joins every group that is equal apart from the axes: an SGD run
    has its own learning rate, and joins the AdamW runs at each of theirs.
    """
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.varies):
        homes = [group for group in groups.values() if run.varies and not group[0].varies]
        homes = [group for group in homes if group[0].shared == run.shared]
        for group in homes or [groups.setdefault(run.shared if run.varies else run.protocol, [])]:
            for other in group:
                if (other.cell, other.seed) == (run.cell, run.seed):
                    raise UserError(f"{other.path} and {run.path} are the same cell and seed; move one of them away")
            group.append(run)
    return list(groups.values())


# The defaults of each part of a configuration.
_UNSET = to_json(TrainConfig(student="", teacher=TeacherConfig(model=""), prompts="", out=""))
_DEFAULTS = {part: values for part, values in _UNSET.items() if isinstance(values, dict)}


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that make up the protocol. Settings that the run's version of opsd did not have count as unset."""
    plain = {name: value for name, value in _UNSET.items() if name in ("teachers", "teacher_field")}
    whole = {**plain, **config, **{part: {**values, **config.get(part, {})} for part, values in _DEFAULTS.items()}}
    whole["eval"] = {name: value for name, value in whole["eval"].items() if name != "cache"}
    return {name: value for name, value in whole.items() if name not in NOT_PROTOCOL}


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error})") from error
