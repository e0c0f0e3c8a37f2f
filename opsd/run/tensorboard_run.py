"""A run in TensorBoard: every metric of metrics.jsonl as a curve, in RUN/tensorboard.

TensorBoard is imported only here, and only if a run asks for it.
"""

from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class Curves:
    """Writes a run's curves. first_step: number of steps done; values of later steps from before are purged."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1 if first_step else 0)

    def log(self, metrics: dict[str, float]) -> None:
        """Add a step's numbers; they are in the file when this returns."""
        for name, value in metrics.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(metrics["step"]))
        self._writer.flush()

    def close(self) -> None:
        """Close the file; the run is over."""
        self._writer.close()
