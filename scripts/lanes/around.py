"""Time that a cell takes besides its steps: start, evaluations before training, and what follows the last step."""

from __future__ import annotations

import json

from lanes.cell import Cell


class Around:
    """Measured on the cells that run, to predict the next ones; all in seconds, 0 until measured.

    start_s: until the models are loaded and the run folder exists. before_s: the evaluations before training, of a
    cell that shares none. after_s: after the last step; until a cell has ended, the time of one of those evaluations.
    """

    def __init__(self) -> None:
        self.start_s = self.before_s = self.after_s = 0.0
        self._seen_end = False
        # Seconds until each cell's folder existed, for cells that began from scratch.
        self._started_s: dict[str, float] = {}

    def started(self, cell: Cell, seconds: float) -> None:
        """The cell's folder exists, this many seconds after its start."""
        if cell.name not in self._started_s:
            self.start_s = self._started_s[cell.name] = seconds

    def evaluated(self, cell: Cell, seconds: float) -> None:
        """The cell has logged its first line, this many seconds after its start."""
        before_s, made = seconds - self._started_s.get(cell.name, 0.0), evaluations_made(cell)
        if made:
            self.before_s = before_s
            self.after_s = self.after_s if self._seen_end else before_s / made

    def ended(self, seconds: float) -> None:
        """A cell has ended, this many seconds after its last step."""
        self.after_s, self._seen_end = max(0.0, seconds), True

    def ahead_of(self, cell: Cell) -> float:
        """Seconds before the first step of a cell that has not begun. Cells with a cache share evaluations."""
        return self.start_s + (0.0 if "--eval.cache" in cell.command else self.before_s)


def evaluations_made(cell: Cell) -> int:
    """How many of the evaluations before training the cell has made itself instead of taking them from another one."""
    made = 0
    for file in (cell.run / "eval" / f"{name}.json" for name in ("teacher", "step_0")):
        if file.exists():
            computed_by = json.loads(file.read_text()).get("shared", {}).get("computed_by", str(cell.run))
            made += computed_by == str(cell.run)
    return made
