"""Sends metrics to the run folder and the console (opsd/run/console.py), and if asked to wandb and TensorBoard."""

from __future__ import annotations

import contextlib
import importlib.util
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from opsd.config import TrainConfig
from opsd.run import wandb_run
from opsd.run.checkpoint import place
from opsd.run.console import PlainLines, evaluation_text, numbers_text, progress_bar
from opsd.run.folder import RunFolder
from opsd.utils.errors import UserError

if TYPE_CHECKING:
    from opsd.run.tensorboard_run import Curves


class Stopwatch:
    """Seconds spent in each named stage of a step."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.seconds = device, {}
        self._start_s = time.perf_counter()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the body's seconds to `name`; on CUDA this includes the work that it queued."""
        start = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """`time/STAGE_s` of each stage, and `time/step_s` since this stopwatch was made."""
        seconds = {**self.seconds, "step": time.perf_counter() - self._start_s}
        return {f"time/{name}_s": value for name, value in seconds.items()}


def forget_peak(device: torch.device) -> None:
    """Reset the peak of `peak_gib` on CUDA; the peak of a process on a CPU cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float:
    """Peak memory in GiB: CUDA memory allocated since `forget_peak`, or the process's peak resident size on CPU.

    vLLM's pool in this process counts as allocated even while it sleeps: PyTorch does not see that it was freed.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.exists():
        # Unlike ru_maxrss, it does not include the process that started this one.
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Tracker:
    """Sends each step's metrics everywhere. Use as a context manager."""

    def __init__(self, run: RunFolder, first_step: int) -> None:
        self._run, self._config = run, run.config
        self._console = Console(stderr=True)
        mode = run.config.track.wandb
        self._wandb = None if mode == "off" else wandb_run.start(run.config, run.path, mode)
        self._curves: Curves | None = None
        if run.config.track.tensorboard:
            from opsd.run.tensorboard_run import Curves

            self._curves = Curves(run.path, first_step)
        self._latest_eval = ""
        self._lines = PlainLines(self._console, run.path.name, run.config, first_step)
        shown = run.config.track.progress and self._console.is_terminal
        self._bar = progress_bar(self._console, run.config.steps, shown)
        self._task = self._bar.add_task(run.path.name, total=run.config.steps, completed=first_step, numbers="starting")

    def __enter__(self) -> Tracker:
        self._bar.start()
        self._lines.start()
        return self

    def __exit__(self, *problem: object) -> None:
        self._bar.stop()
        self._lines.stop()
        if self._wandb is not None:
            self._wandb.summary.update(wandb_run.summary(self._run.path / "metrics.jsonl"))
            self._wandb.finish(exit_code=0 if problem[0] is None else 1)
        if self._curves is not None:
            self._curves.close()

    def finished(self) -> None:
        """Print where the finished run's model is, and what to do next."""
        if self._config.track.progress:
            model, run = place(self._run.checkpoints, self._config.steps), self._run.path
            self.say(f"finished: the model is in {model}; for curves and evaluations run scripts/report.py {run}")

    def say(self, text: str) -> None:
        """One line for the user."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def doing(self, what: str) -> None:
        """Show what the run is doing, in place of a step's numbers."""
        self._bar.update(self._task, numbers=what)
        self._lines.doing(what)

    def stage(self, name: str) -> None:
        """Set the current stage of the step."""
        self._lines.stage = name

    def step(self, metrics: dict[str, float]) -> None:
        """Record one step; metrics["step"] is its number."""
        self._run.write_metrics(metrics)
        if self._wandb is not None:
            step = int(metrics["step"])
            table = wandb_run.sample_table(self._run.path / "rollouts" / f"step_{step}.jsonl", step)
            self._wandb.log(metrics if table is None else {**metrics, "rollout/samples": table}, step=step)
        if self._curves is not None:
            self._curves.log(metrics)
        self._latest_eval = evaluation_text(metrics) or self._latest_eval
        numbers = numbers_text(metrics, self._latest_eval)
        self._bar.update(self._task, completed=metrics["step"], numbers=numbers)
        self._lines.step(int(metrics["step"]), numbers)


def check_trackers(config: TrainConfig) -> None:
    """Raises UserError if a requested tracker is not installed."""
    asked = {"wandb": config.track.wandb != "off", "tensorboard": config.track.tensorboard}
    for name, wanted in asked.items():
        if wanted and importlib.util.find_spec(name) is None:
            given = getattr(config.track, name)
            raise UserError(f"--track.{name} {given}: {name} is not installed; pip install {name}")
