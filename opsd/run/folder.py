"""A run's folder: config.json, metrics.jsonl, rollouts/, tokens/, checkpoints/, eval/, DONE."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from opsd.config import TrackConfig, TrainConfig, to_json
from opsd.config.saved import read_run
from opsd.run.attempt import alone, put_aside
from opsd.run.began import Began
from opsd.run.card import model_card
from opsd.run.disk import append, replace, replacing, writing
from opsd.types import Rollout
from opsd.utils.errors import UserError
from opsd.utils.going_on import can_go_on
from opsd.utils.paths import check_new_run

_STEP_FILE = re.compile(r"(?:skipped_at_)?step_(\d+)\.\w+")


class RunFolder:
    """Reads and writes one run's files. On resume, what was written after the checkpoint is removed, never doubled.

    began: what the run began with; None in folders of earlier versions. extended: its former total numbers of steps,
    if it was extended. notes: lines to print at the start.
    """

    notes: tuple[str, ...] = ()

    def __init__(
        self, path: Path, config: TrainConfig, began: Began | None = None, extended: Sequence[int] = ()
    ) -> None:
        self.path, self.config, self.began, self.extended = path, config, began, list(extended)
        can_go_on(f"--resume {path}")
        self.checkpoints = path / "checkpoints"

    @classmethod
    def create(cls, config: TrainConfig, began: Began | None = None) -> RunFolder:
        """A new run's folder. Files of an attempt that trained no step are moved aside.

        Raises UserError if it cannot be made or has other files.
        """
        path = Path(config.out)
        check_new_run(path)
        try:
            aside = put_aside(path) if (path / "config.json").exists() else None
            path.mkdir(parents=True, exist_ok=True)
            folder = cls(path, config, began)
            folder._write_config()
            if aside is not None:
                folder.notes = (f"an earlier attempt ended before it finished a step: its files are in {aside}",)
        except OSError as error:
            raise UserError(f"--out {path} cannot be made ({error.strerror}); give another folder") from error
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run's folder. Raises UserError if there is none."""
        config, beside = read_run(path)
        try:
            return cls(path, config, Began.from_json(beside.get("began")), beside.get("extended", []))
        except UserError as error:
            raise UserError(f"--resume {path}: {error}") from error

    def extend(self, steps: int) -> None:
        """Extend the run to `steps` in total; config.json records the former end."""
        self.extended, self.config = [*self.extended, self.config.steps], dataclasses.replace(self.config, steps=steps)
        with writing(self.path / "config.json"):
            # In this order: a run that is killed in between can be resumed as it was.
            (self.path / "DONE").unlink(missing_ok=True)
            self._write_config()

    def _write_config(self) -> None:
        values = to_json(self.config) | ({} if self.began is None else {"began": self.began.to_json()})
        values |= {"extended": self.extended} if self.extended else {}
        replace(self.path / "config.json", json.dumps(values, indent=2) + "\n")

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Context in which no other process can start or resume this run. Raises UserError if one has."""
        return alone(self.path)

    @property
    def done(self) -> bool:
        """Whether the run has finished."""
        return (self.path / "DONE").exists()

    def finish(self) -> None:
        """Mark the run as finished."""
        with writing(self.path / "DONE"):
            replace(self.path / "DONE", "")

    def cut_after(self, step: int | None) -> bool:
        """Remove everything that was written after `step` (None: everything but the configuration).

        Returns whether metrics.jsonl has a line for `step`. An incomplete line (killed process, full disk) is dropped.
        """
        last = -1 if step is None else step
        metrics = self.path / "metrics.jsonl"
        kept: list[str] = []
        with writing(self.path):
            if metrics.exists():
                kept = [line for line in metrics.read_text(errors="replace").splitlines() if _step_of(line) <= last]
                replace(metrics, "".join(line + "\n" for line in kept))
            for folder in ("rollouts", "tokens", "eval"):
                for file in (self.path / folder).glob("*step_*"):
                    match = _STEP_FILE.fullmatch(file.name)
                    if match and int(match[1]) > last:
                        file.unlink()
        return bool(kept) and _step_of(kept[-1]) == last

    def last_step(self) -> int:
        """The last step of metrics.jsonl; 0 if it has none."""
        return int(max((line["step"] for line in self.history()), default=0))

    def history(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl so far, except truncated ones."""
        file = self.path / "metrics.jsonl"
        lines = file.read_text(errors="replace").splitlines() if file.exists() else []
        return [json.loads(line) for line in lines if _step_of(line) < float("inf")]

    def skipped_in_row(self) -> int:
        """Number of consecutive skipped steps (--optim.on_nonfinite) at the end of metrics.jsonl."""
        lines = self.history()
        used = (place for place, line in enumerate(reversed(lines)) if not line.get("optim/skipped"))
        return next(used, len(lines))

    def write_metrics(self, metrics: dict[str, float]) -> None:
        """Append one step's line; it is on the disk when this returns."""
        with writing(self.path / "metrics.jsonl"):
            append(self.path / "metrics.jsonl", json.dumps(metrics) + "\n")

    def write_eval(self, name: str, result: dict[str, Any]) -> None:
        """Write eval/NAME.json."""
        self._text("eval", f"{name}.json", json.dumps(result, indent=1) + "\n")

    def read_eval(self, name: str) -> dict[str, Any] | None:
        """The content of eval/NAME.json; None if it is missing or damaged, and so must be computed again."""
        try:
            return json.loads((self.path / "eval" / f"{name}.json").read_text())
        except (OSError, ValueError):
            return None

    def write_card(self, step: int) -> None:
        """Write README.md into the checkpoint of `step`, if there is one; the checksums do not cover it."""
        place = self.checkpoints / f"step_{step}"
        if place.is_dir():
            names = ("step_0", f"step_{step}", "teacher")
            found = {name: result for name in names if (result := self.read_eval(name)) is not None}
            with writing(place / "README.md"):
                replace(place / "README.md", model_card(self.config, step, found))

    def write_rollouts(self, name: str, rollouts: list[Rollout], tokenizer: Any, rewards: list[float] | None) -> None:
        """Write rollouts/NAME.jsonl: one object per rollout, with ids, text and (if graded) reward."""
        lines = []
        for place, rollout in enumerate(rollouts):
            lines.append(
                json.dumps(
                    {
                        "id": rollout.id,
                        "prompt_id": rollout.prompt.id,
                        "prompt_ids": rollout.prompt.ids,
                        **({} if (own := rollout.prompt.teacher_ids) is None else {"teacher_prompt_ids": own}),
                        "response_ids": rollout.response_ids,
                        "student_mask": rollout.student_mask,
                        "truncated": rollout.truncated,
                        "text": tokenizer.decode(rollout.response_ids),
                        "answer": rollout.prompt.answer,
                        "reward": None if rewards is None else rewards[place],
                    }
                )
            )
        self._text("rollouts", f"{name}.jsonl", "".join(line + "\n" for line in lines))

    def write_tokens(self, step: int, table: pd.DataFrame) -> None:
        """Write tokens/step_N.parquet: one row per student token (its columns: opsd/run/token_record.py)."""
        target = self.path / "tokens" / f"step_{step}.parquet"
        with writing(target):
            target.parent.mkdir(exist_ok=True)
            with replacing(target) as temporary:
                table.to_parquet(temporary, index=False)

    def _text(self, folder: str, name: str, text: str) -> None:
        path = self.path / folder / name
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            replace(path, text)


class Follower(RunFolder):
    """The run's folder on all ranks but the first: nothing is written, shown or tracked."""

    def __init__(self, path: Path, config: TrainConfig) -> None:
        super().__init__(path, dataclasses.replace(config, track=TrackConfig(progress=False)))

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Does nothing: only the first rank locks, reads and writes; so do the methods below."""
        return contextlib.nullcontext()

    def history(self) -> list[dict[str, float]]:
        """Empty: only the first rank reads it."""
        return []

    def _nothing(self, *_: Any) -> None:
        """Does nothing."""

    finish = write_metrics = write_eval = read_eval = write_card = write_rollouts = _nothing  # pyrefly: ignore


def _step_of(line: str) -> float:
    """The step of a metrics line; infinity for an incomplete line."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
