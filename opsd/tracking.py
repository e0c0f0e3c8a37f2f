"""Where numbers go: the run folder always, a progress bar on a terminal, wandb when asked."""

from __future__ import annotations

import contextlib
import importlib.util
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from opsd import wandbrun
from opsd.config import TrainConfig
from opsd.errors import UserError
from opsd.runfolder import RunFolder


class Stopwatch:
    """Seconds spent in each named stage of a step."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.seconds = device, {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the body's seconds to `name`; on CUDA the work that it queued is waited for."""
        start = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def peak_gib(device: torch.device) -> float:
    """Peak memory in GiB: CUDA memory allocated, or the process's peak resident size on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.exists():
        # Unlike ru_maxrss, it forgets the process that started this one.
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
        self._wandb = None if mode == "off" else wandbrun.start(run.config, run.path, mode)
        self._latest_eval = ""
        self._bar = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=24),
            # In a narrow terminal the bar gives way, never the count.
            MofNCompleteColumn(table_column=Column(min_width=2 * len(str(run.config.steps)) + 1)),
            TextColumn("{task.fields[numbers]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not run.config.track.progress,
        )
        self._task = self._bar.add_task(run.path.name, total=run.config.steps, completed=first_step, numbers="starting")

    def __enter__(self) -> Tracker:
        self._bar.start()
        return self

    def __exit__(self, *problem: object) -> None:
        self._bar.stop()
        if self._wandb is not None:
            self._wandb.summary.update(wandbrun.summary(self._run.path / "metrics.jsonl"))
            self._wandb.finish(exit_code=0 if problem[0] is None else 1)

    def say(self, text: str) -> None:
        """One line for the user."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def doing(self, what: str) -> None:
        """Show what takes long just now."""
        self._bar.update(self._task, numbers=what)

    def step(self, metrics: dict[str, float]) -> None:
        """Record one step; metrics["step"] is its number."""
        self._run.write_metrics(metrics)
        if self._wandb is not None:
            step = int(metrics["step"])
            table = wandbrun.sample_table(self._run.path / "rollouts" / f"step_{step}.jsonl", step)
            self._wandb.log(metrics if table is None else {**metrics, "rollout/samples": table}, step=step)
        self._latest_eval = _eval_text(metrics) or self._latest_eval
        self._bar.update(self._task, completed=metrics["step"], numbers=_numbers(metrics, self._latest_eval))


def _numbers(metrics: dict[str, float], latest_eval: str) -> str:
    """The numbers that matter, short."""
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


def _eval_text(metrics: dict[str, float]) -> str:
    found = [
        f"{key.split('/')[1]} {value:.1%}"
        for key, value in metrics.items()
        if key.startswith("eval/") and "/mean@" in key
    ]
    return ", ".join(found[:2])


def check_wandb(config: TrainConfig) -> None:
    """Raises UserError where wandb is asked for and not installed."""
    if config.track.wandb != "off" and importlib.util.find_spec("wandb") is None:
        raise UserError(f"--track.wandb {config.track.wandb}: wandb is not installed; pip install wandb")
