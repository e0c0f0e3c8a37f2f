"""Progress of a table: on a terminal a live display, elsewhere a line from time to time."""

from __future__ import annotations

import heapq
import time

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lanes.around import Around
from lanes.cell import Cell, Progress
from opsd.utils.durations import in_words

# Without a terminal: seconds between two progress lines.
PLAIN_EVERY_S = 30.0


def short(name: str, most: int = 24) -> str:
    """A name, without its middle if it is long: its end, the seed, distinguishes cells."""
    return name if len(name) <= most else f"{name[: most - 12]}…{name[-11:]}"


def time_left(running: list[float], waiting: list[float], lanes: int) -> float:
    """Seconds until all cells are done. running: seconds left of each running cell; waiting: of the others, in order.

    A cell that waits starts in the first lane that is free.
    """
    ends = [0.0] * (lanes - len(running)) + running
    heapq.heapify(ends)
    for seconds in waiting:
        heapq.heapreplace(ends, ends[0] + seconds)
    return max(ends)


class Board:
    """The whole table. Use as a context manager; call `begin`, `end`, and often `look`."""

    def __init__(self, title: str, cells: list[Cell], lanes: int, console: Console) -> None:
        self._title, self._cells, self._lanes, self._console = title, cells, lanes, console
        self._progress = {cell.name: Progress(cell) for cell in cells}
        self._running: dict[str, float] = {}
        self._done = {cell.name for cell in cells if cell.is_done}
        self._around = Around()
        # For each cell: the step it was started from (-1: from scratch); then the time and the step of the first line
        # that it has logged since.
        self._from: dict[str, int] = {}
        self._first: dict[str, tuple[float, int]] = {}
        self._told_s = time.monotonic()
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=2, transient=True)

    def __enter__(self) -> Board:
        self.look()
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *problem: object) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def begin(self, cell: Cell) -> None:
        """A cell starts, or is resumed."""
        progress = self._progress[cell.name]
        self._running[cell.name] = time.monotonic()
        self._from[cell.name] = progress.step if progress.begun else -1
        if not self._console.is_terminal:
            self.say(f"{cell.label} {cell.name}{': resuming' if cell.is_begun else ''}")

    def end(self, cell: Cell) -> None:
        """A cell is done."""
        progress, seconds = self._progress[cell.name], time.monotonic() - self._running.pop(cell.name)
        self._done.add(cell.name)
        progress.look()
        if cell.name in self._first and progress.step_s is not None:
            before_s, step = self._first[cell.name]
            self._around.ended(seconds - before_s - (progress.step - step) * progress.step_s)
        self.say(
            f"{cell.label} {cell.name}: done in {in_words(seconds)}{''.join(f', {one}' for one in progress.accuracies)}"
        )

    def look(self) -> None:
        """Read the cells' progress; without a terminal, print a line if one is due."""
        now = time.monotonic()
        for cell in self._cells:
            if cell.name not in self._done:
                self._look_at(cell, now)
        if not self._console.is_terminal and now - self._told_s >= PLAIN_EVERY_S:
            self._told_s = now
            steps, whole = self._steps()
            cells = f"{len(self._done)} of {len(self._cells)} cells done"
            self.say(f"{self._title}: step {steps}/{whole}, {cells}, {self._left_in_words()}")

    def _look_at(self, cell: Cell, now: float) -> None:
        """Check whether the cell has loaded its models, and logged its first step, since it was started."""
        progress, since = self._progress[cell.name], self._running.get(cell.name)
        progress.look()
        start = self._from.get(cell.name, -1)
        if since is None or cell.name in self._first:
            return
        if start < 0 and cell.is_begun:
            self._around.started(cell, now - since)
        if progress.begun and progress.step > start:
            self._first[cell.name] = (now - since, progress.step)
            if start < 0:
                self._around.evaluated(cell, now - since)

    def _steps(self) -> tuple[int, int]:
        """Steps done, and steps of the whole table."""
        done = (cell.steps if cell.name in self._done else self._progress[cell.name].step for cell in self._cells)
        return sum(done), sum(cell.steps for cell in self._cells)

    def _left_in_words(self) -> str:
        left = self._left()
        return "time left unknown" if left is None else f"{in_words(left)} left"

    def _left(self) -> float | None:
        """Seconds until the table is done, from the time its steps take; None before the first step."""
        paces = [pace for progress in self._progress.values() if (pace := progress.step_s) is not None]
        if not paces:
            return None
        common = sum(paces) / len(paces)
        now, running, waiting = time.monotonic(), [], []
        for cell in self._cells:
            if cell.name in self._done:
                continue
            progress, since = self._progress[cell.name], self._running.get(cell.name)
            steps = cell.steps - progress.step
            # The line of the last step comes after the last evaluation.
            seconds = steps * (progress.step_s or common) + (self._around.after_s if steps else 0.0)
            # A resumed cell does not evaluate first.
            ahead = self._around.start_s if progress.begun else self._around.ahead_of(cell)
            if since is None:
                waiting.append(seconds + ahead)
            else:
                running.append(seconds + (0.0 if cell.name in self._first else max(0.0, ahead - (now - since))))
        return time_left(running, waiting, self._lanes)

    def _render(self) -> RenderableType:
        steps, whole = self._steps()
        table = Table.grid(padding=(0, 2), expand=True)
        table.add_column(no_wrap=True, overflow="ellipsis", max_width=24)
        table.add_column(ratio=1)
        for _ in range(3):
            table.add_column(no_wrap=True)
        cells = f"{len(self._done)}/{len(self._cells)} cells"
        bar = ProgressBar(total=whole, completed=steps)
        table.add_row(Text(self._title), bar, f"step {steps}/{whole}", cells, self._left_in_words(), style="bold")
        return Group(table, self._rows())

    def _rows(self) -> Table:
        """A line per running cell."""
        counted = 2 * len(str(max(cell.steps for cell in self._cells))) + 1
        rows = Table.grid(padding=(0, 2), expand=True)
        rows.add_column(no_wrap=True)
        rows.add_column(no_wrap=True, justify="right", min_width=counted)
        rows.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        for cell in self._cells:
            if cell.name in self._running:
                progress, name = self._progress[cell.name], Text(f"{cell.label} {short(cell.name)}")
                rows.add_row(name, f"{progress.step}/{cell.steps}", Text(progress.numbers))
        return rows
