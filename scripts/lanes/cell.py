"""A cell of a table: the command that makes its run, and its progress as read from the run's files."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A step's time is the median over this many newest steps: it changes with the length of the answers.
_RECENT = 40


@dataclass(frozen=True)
class Cell:
    """One run of a table. name: of its folder. line: its command as a shell command line.

    launch: the words in front of `train`'s flags, with `train`; command: all words. label: its place, e.g. [2/5].
    """

    name: str
    run: Path
    line: str
    launch: tuple[str, ...]
    command: tuple[str, ...]
    label: str

    @property
    def steps(self) -> int:
        """Steps of the whole run; if the flag is given twice, the last one counts."""
        last = len(self.command) - 1 - self.command[::-1].index("--steps")
        return int(self.command[last + 1])

    @property
    def made(self) -> Path:
        """File that holds `line`; the process that runs the cell keeps it locked."""
        return self.run.with_name(f"{self.name}.command")

    @property
    def log(self) -> Path:
        """The output of the cell, over all its starts."""
        return self.run.with_name(f"{self.name}.log")

    @property
    def is_done(self) -> bool:
        """Whether the run has finished."""
        return (self.run / "DONE").exists()

    @property
    def is_begun(self) -> bool:
        """Whether there is a run to resume."""
        return (self.run / "config.json").exists()

    @property
    def next_command(self) -> tuple[str, ...]:
        """The command that starts or resumes the run."""
        return (*self.launch, "--resume", str(self.run)) if self.is_begun else self.command


def read_cells(text: str) -> list[Cell]:
    """Cells from words that each end with a NUL.

    For each cell: name, run folder, line, the counts of words in the launch and in the command, the command's words.
    """
    words = text.split("\0")[:-1]
    found: list[list[Any]] = []
    while words:
        name, run, line, launch, count, *words = words
        command, words = tuple(words[: int(count)]), words[int(count) :]
        found.append([name, Path(run), line, command[: int(launch)], command])
    return [Cell(*values, label=f"[{number}/{len(found)}]") for number, values in enumerate(found, start=1)]


class Progress:
    """Progress of a cell's run, from its metrics.jsonl; each `look` reads the new lines."""

    def __init__(self, cell: Cell) -> None:
        self._file, self._steps = cell.run / "metrics.jsonl", cell.steps
        self._last_checkpoint = cell.run / "checkpoints" / f"step_{cell.steps}"
        self._forget()

    def look(self) -> None:
        """Read the lines that are new. A file that became shorter was cut by a resume, and is read again."""
        try:
            size = self._file.stat().st_size
        except FileNotFoundError:
            return
        if size < self._place:
            self._forget()
        with self._file.open("rb") as stream:
            stream.seek(self._place)
            new = stream.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._place += len(whole)
        for line in whole.splitlines():
            self._take(json.loads(line))

    def _forget(self) -> None:
        self._place, self.step, self.begun = 0, 0, False
        self._latest: dict[str, float] = {}
        self._seconds: list[float] = []

    def _take(self, metrics: dict[str, float]) -> None:
        self.begun, self.step = True, int(metrics["step"])
        self._latest |= metrics
        if "time/step_s" in metrics:
            self._seconds = [*self._seconds[1 - _RECENT :], metrics["time/step_s"]]

    @property
    def step_s(self) -> float | None:
        """Seconds a step takes; None before the first."""
        return statistics.median(self._seconds) if self._seconds else None

    @property
    def numbers(self) -> str:
        """The main numbers in short, or the current phase if there are none yet."""
        shown = [] if self.begun else ["starting, evaluating"]
        if self.step == self._steps - 1 and self._last_checkpoint.exists():
            shown.append("evaluating")
        for key, shape in (("loss/nats", "loss {:.3f}"), ("rollout/reward", "reward {:.2f}")):
            if key in self._latest:
                shown.append(shape.format(self._latest[key]))
        return ", ".join([*shown, *self.accuracies])

    @property
    def accuracies(self) -> list[str]:
        """The newest accuracies on the first two suites."""
        evals = [key for key in self._latest if key.startswith("eval/") and "/mean@" in key]
        return [f"{key.split('/')[1]} {100 * self._latest[key]:.1f} %" for key in evals[:2]]
