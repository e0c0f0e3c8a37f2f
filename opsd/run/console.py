"""A run's progress: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from opsd.config import TrainConfig
from opsd.utils.durations import in_words

# Without a terminal: minimum time between the lines of two steps; and the time after which a line says what is being
# done, if a step or an evaluation takes longer.
LINES_APART_S, PLAIN_EVERY_S = 10.0, 30.0
# Width of h:mm:ss, in characters.
TIME_WIDTH = 7


def progress_bar(console: Console, total: int, shown: bool) -> Progress:
    """A bar whose tasks show their `numbers` at the end; on a narrow terminal only these are cut."""
    count, name, bar = 2 * len(str(total)) + 1, 24, 24 if console.width >= 110 else 6
    numbers = max(10, console.width - name - bar - count - 2 * TIME_WIDTH - 6)
    return Progress(
        TextColumn("{task.description}", style="bold", markup=False, table_column=_column(max_width=name)),
        BarColumn(bar_width=bar),
        MofNCompleteColumn(table_column=_column(min_width=count)),
        TimeElapsedColumn(table_column=_column(min_width=TIME_WIDTH)),
        TimeRemainingColumn(table_column=_column(min_width=TIME_WIDTH)),
        TextColumn("{task.fields[numbers]}", markup=False, table_column=_column(max_width=numbers)),
        console=console,
        disable=not shown,
    )


def _column(min_width: int | None = None, max_width: int | None = None) -> Column:
    return Column(no_wrap=True, overflow="ellipsis", min_width=min_width, max_width=max_width)


class PlainLines:
    """Replaces the bar if there is no terminal: lines with the same numbers, and one at the end."""

    def __init__(self, console: Console, name: str, config: TrainConfig, first_step: int) -> None:
        self._console, self._name, self._steps = console, name, config.steps
        self._wanted = config.track.progress and not console.is_terminal
        self._step, self._numbers, self.stage = first_step, "starting", ""
        # Step and time of the first step reported: the pace counts from there, without the time before training.
        self._clock: tuple[int, float] | None = None
        self._pace_s, self._said, self._said_s = 0.0, "", -LINES_APART_S
        self._over, self._one_at_a_time = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._tell, name="progress", daemon=True)

    def start(self) -> None:
        """Start printing from a thread, because an evaluation may take much longer than the time between lines."""
        if self._wanted:
            self._thread.start()

    def stop(self) -> None:
        """Stop, and print the last line."""
        if self._wanted:
            self._over.set()
            self._thread.join()
            self._say()

    def doing(self, what: str) -> None:
        """Show `what` in place of a step's numbers."""
        self._numbers = what

    def step(self, step: int, numbers: str) -> None:
        """Report a finished step."""
        self._step, self._numbers, now = step, numbers, time.monotonic()
        if self._clock is None:
            self._clock = step, now
        elif step > self._clock[0]:
            self._pace_s = (now - self._clock[1]) / (step - self._clock[0])
        if self._wanted and now - self._said_s >= LINES_APART_S:
            self._say(now)

    def _tell(self) -> None:
        while not self._over.wait(PLAIN_EVERY_S):
            if time.monotonic() - self._said_s >= PLAIN_EVERY_S:
                self._say(at=f" · now: {self.stage}" if self.stage else "")

    def _say(self, now: float | None = None, at: str = "") -> None:
        left = self._steps - self._step
        ahead = f", {in_words(left * self._pace_s)} left" if left and self._pace_s else ""
        text = f"{self._name}: step {self._step}/{self._steps}, {self._numbers}{at}{ahead}"
        with self._one_at_a_time:
            self._said_s = time.monotonic() if now is None else now
            # Do not repeat the last line at the end.
            if text != self._said or not self._over.is_set():
                self._console.print(text, highlight=False, markup=False, soft_wrap=True)
            self._said = text


def numbers_text(metrics: dict[str, float], latest_eval: str) -> str:
    """A step's most important numbers, in short form."""
    shown = []
    for key, label, form in (
        ("loss/nats", "loss", "{:.3f}"),
        ("rollout/reward", "reward", "{:.2f}"),
        ("select/kept_frac", "kept", "{:.0%}"),
        ("mem/peak_gib", "mem", "{:.1f} GiB"),
        ("time/step_s", "step", "{:.2f} s"),
    ):
        if key in metrics:
            shown.append(f"{label} {form.format(metrics[key])}")
    return " · ".join([*shown, *([latest_eval] if latest_eval else [])])


def evaluation_text(metrics: dict[str, float]) -> str:
    """mean@k of the first two suites, if the step was evaluated; else ""."""
    found = [
        f"{key.split('/')[1]} {value:.1%}"
        for key, value in metrics.items()
        if key.startswith("eval/") and "/mean@" in key
    ]
    return ", ".join(found[:2])
