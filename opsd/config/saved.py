"""Reads and checks a run's config.json before the heavy libraries that resume the run are loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsd.config.cli import parse
from opsd.config.schema import TrainConfig, from_json
from opsd.config.settings import PositiveInt, Settings
from opsd.utils.errors import UserError, said
from opsd.utils.paths import check_old_run


@dataclass(frozen=True)
class ResumeConfig(Settings):
    """Continue a run."""

    resume: Path
    """The run's folder."""
    steps: PositiveInt | None = None
    """New total number of optimiser steps, to extend the run beyond its original end."""


def parse_resume(args: list[str]) -> ResumeConfig:
    """The arguments of `opsd train --resume`. Raises UserError."""
    others = [word for word in args if word.startswith("--") and word.partition("=")[0] not in ("--resume", "--steps")]
    if others:
        raise UserError(
            f"--resume RUN takes no {others[0]}: a resumed run keeps its settings; only --steps N may be given; "
            "start a new run to change others"
        )
    return parse(ResumeConfig, args, "opsd train --resume")


def read_run(path: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """A run folder's settings, and the other keys of its config.json: "began", "extended". Raises UserError."""
    check_old_run(path)
    with said(f"--resume {path}: config.json is not JSON", "put it back, or start a new run", ValueError):
        values = json.loads((path / "config.json").read_text())
    if not isinstance(values, dict):
        raise UserError(f"--resume {path}: config.json holds no settings; put it back, or start a new run")
    beside = {name: values.pop(name) for name in ("began", "extended") if name in values}
    if isinstance(select := values.get("select"), dict):
        select.setdefault("normalise_over", "micro_batch")  # the default before folders stated it
    try:
        return from_json(values), beside
    except UserError as error:
        raise UserError(f"--resume {path}: {error}") from error


def check_resumable(path: Path, steps: int | None = None) -> TrainConfig:
    """The settings that a run resumes with. steps: the new total number of steps, if it is to be extended.

    Raises UserError if it has finished, or if `steps` would not extend it.
    """
    config, _ = read_run(path)
    if steps is not None and steps <= config.steps:
        raise UserError(f"--steps {steps}: the run {path} has {config.steps} steps; give more to extend it")
    if steps is None and (path / "DONE").exists():
        raise UserError(
            f"--resume {path}: this run has finished after {config.steps} steps; give --steps N to extend it, or start "
            "a new one"
        )
    return config
