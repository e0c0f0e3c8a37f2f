"""What a cell takes beside its steps: its start, the evaluations before training, and what follows the last step."""

from __future__ import annotations

import json

from lanes.cell import Cell


class Around:
    """Learnt from the cells that run, for those that are to come; all in seconds, 0 until one has shown it.

    start_s: until the models are loaded and the run's folder is there. before_s: the evaluations before training, of a
    cell that shares none. after_s: the end; until a cell has ended, what one of those evaluations takes.
    """

    def __init__(self) -> None:
        self.start_s = self.before_s = self.after_s = 0.0
        self._seen_end = False
        # What each cell has taken so far, where it began from nothing.
        self._started_s: dict[str, float] = {}

    def started(self, cell: Cell, seconds: float) -> None:
        """The cell's folder is there, so long after it was started."""
        if cell.name not in self._started_s:
            self.start_s = self._started_s[cell.name] = seconds

    def evaluated(self, cell: Cell, seconds: float) -> None:
        """The cell has told its first line, so long after it was started."""
        before_s, made = seconds - self._started_s.get(cell.name, 0.0), evaluations_made(cell)
        if made:
            self.before_s = before_s
            self.after_s = self.after_s if self._seen_end else before_s / made

    def ended(self, seconds: float) -> None:
        """A cell has ended, so long after its last step."""
        self.after_s, self._seen_end = max(0.0, seconds), True

    def ahead_of(self, cell: Cell) -> float:
        """Of a cell that has not begun: seconds in front of its first step. Cells with a cache share evaluations."""
        return self.start_s + (0.0 if "--eval.cache" in cell.command else self.before_s)


def evaluations_made(cell: Cell) -> int:
    """How many of the evaluations before training the cell has made itself, and not taken from another one."""
    made = 0
    for file in (cell.run / "eval" / f"{name}.json" for name in ("teacher", "step_0")):
        if file.exists():
            computed_by = json.loads(file.read_text()).get("shared", {}).get("computed_by", str(cell.run))
            made += computed_by == str(cell.run)
    return made
