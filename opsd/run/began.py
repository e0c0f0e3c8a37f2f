"""A run's prompts, suites and models when it began: a resumed run must have the same."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from opsd.config import TrainConfig
from opsd.data.prompts import digest
from opsd.data.template import Clock
from opsd.model.files import files_digest
from opsd.model.stops import PairStops
from opsd.types import Prompt
from opsd.utils.errors import DAMAGED, UserError, said


@dataclass(frozen=True)
class Began:
    """Part of config.json. digests: of "prompts" and of each "eval.suite NAME"; they do not depend on file paths.

    time: the time that the chat template used; None if it used none. stops: the tokens with which each model ends a
    turn, and those chosen; None in folders of earlier versions, whose rollouts ended at the student's. models: digests
    of the folders that are read, by flag; folders of earlier versions lack them.
    """

    digests: dict[str, str]
    time: datetime | None = None
    stops: PairStops | None = None
    models: dict[str, str | None] = field(default_factory=dict)

    @classmethod
    def of(cls, asked: dict[str, list[Prompt]], clock: Clock, models: dict[str, str]) -> Began:
        """The digests of these prompts, rendered with `clock`, and of these models. models: folders by flag."""
        folders = {flag: files_digest(Path(path), "config.json", "*.safetensors") for flag, path in models.items()}
        return cls(
            {name: digest(own) for name, own in asked.items()}, clock.time if clock.asked else None, None, folders
        )

    def check(self, now: Began, config: TrainConfig) -> None:
        """Raises UserError if `now` has other prompts, suites or models."""
        files = {f"eval.suite {pair.partition('=')[0]}": pair.partition("=")[2] for pair in config.eval.suite}
        context = f" or {config.teacher.context}" if config.teacher.context else ""
        files["prompts"] = f"{config.prompts}{context}"
        for name, began in self.digests.items():
            if now.digests.get(name) != began:
                raise UserError(
                    f"--resume {config.out}: {files.get(name, name)} gives other prompts than those that the run "
                    f"started with (digest of {name}: {now.digests.get(name)}, not {began}); put the old file back, "
                    "or start a new run"
                )
        for flag, found in now.models.items():
            if self.models.get(flag) not in (None, found):
                raise UserError(
                    f"--resume {config.out}: the model of {flag} is not the one that the run started with (digest of "
                    f"weights and config.json: {found}, not {self.models[flag]}); put it back, or start a new run"
                )

    def to_json(self) -> dict[str, Any]:
        """The values as plain JSON."""
        return dataclasses.asdict(self) | {"time": None if self.time is None else self.time.isoformat()}

    @classmethod
    def from_json(cls, values: Any) -> Began | None:
        """The inverse; None for None, because folders of earlier versions lack the values. Raises UserError."""
        if values is None:
            return None
        with said("config.json: 'began' is damaged", "put it back, or start a new run", *DAMAGED):
            digests, time = dict(values["digests"]), values["time"]
            stops, models = PairStops.from_json(values.get("stops")), dict(values.get("models", {}))
        return cls(digests, None if time is None else parse_time(time, "config.json"), stops, models)


def parse_time(text: Any, where: str) -> datetime:
    """Parse an ISO time. Raises UserError for anything else; where: the file that it is from."""
    with said(f"{where}: the time {text!r} is damaged", "put it back, or start again", *DAMAGED):
        return datetime.fromisoformat(text)


def time_of_run(model: Path) -> datetime | None:
    """If `model` is a run's checkpoint, the time that the run's chat template used, if any; else None."""
    try:
        said = json.loads((model.resolve().parents[1] / "config.json").read_text()).get("began")
    except (OSError, ValueError, IndexError, AttributeError):
        return None
    began = Began.from_json(said)
    return None if began is None else began.time
