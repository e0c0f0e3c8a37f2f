"""Where numbers go: the run folder always; a progress bar on a terminal, else a line now and then; wandb when asked."""

from __future__ import annotations

import contextlib
import importlib.util
import resource
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from opsd.config import TrainConfig
from opsd.run import wandb_run
from opsd.run.folder import RunFolder
from opsd.utils.durations import in_words
from opsd.utils.errors import UserError

# Where there is no terminal: seconds between two lines that say how far the run is.
PLAIN_EVERY_S = 30.0


class Stopwatch:
    """Seconds spent in each named stage of a step."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.seconds = device, {}
        self._start_s = time.perf_counter()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the body's seconds to `name`; on CUDA the work that it queued is waited for."""
        start = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """`time/STAGE_s` of each stage, and `time/step_s` since this watch began."""
        seconds = {**self.seconds, "step": time.perf_counter() - self._start_s}
        return {f"time/{name}_s": value for name, value in seconds.items()}


def forget_peak(device: torch.device) -> None:
    """Let the peak of `peak_gib` start here on CUDA; that of a process on a CPU cannot be forgotten."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float:
    """Peak memory in GiB: CUDA memory allocated since `forget_peak`, or the process's peak resident size on CPU.

    vLLM's pool in this process counts as allocated, asleep or not: PyTorch does not see that it was given back.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.exists():
        # Unlike ru_maxrss, it forgets the process that started this one.
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def progress_bar(console: Console, total: int, shown: bool) -> Progress:
    """A bar whose tasks say their `numbers` behind the count."""
    return Progress(
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=24),
        # In a narrow terminal the bar gives way, never the count.
        MofNCompleteColumn(table_column=Column(min_width=2 * len(str(total)) + 1)),
        TextColumn("{task.fields[numbers]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not shown,
    )


class Tracker:
    """Sends each step's metrics everywhere. Use as a context manager."""

    def __init__(self, run: RunFolder, first_step: int) -> None:
        self._run, self._config = run, run.config
        self._console = Console(stderr=True)
        mode = run.config.track.wandb
        self._wandb = None if mode == "off" else wandb_run.start(run.config, run.path, mode)
        self._latest_eval = ""
        self._lines = _PlainLines(self._console, run, first_step)
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

    def say(self, text: str) -> None:
        """One line for the user."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def doing(self, what: str) -> None:
        """Show what takes long just now."""
        self._bar.update(self._task, numbers=what)
        self._lines.doing(what)

    def step(self, metrics: dict[str, float]) -> None:
        """Record one step; metrics["step"] is its number."""
        self._run.write_metrics(metrics)
        if self._wandb is not None:
            step = int(metrics["step"])
            table = wandb_run.sample_table(self._run.path / "rollouts" / f"step_{step}.jsonl", step)
            self._wandb.log(metrics if table is None else {**metrics, "rollout/samples": table}, step=step)
        self._latest_eval = _eval_text(metrics) or self._latest_eval
        numbers = _numbers(metrics, self._latest_eval)
        self._bar.update(self._task, completed=metrics["step"], numbers=numbers)
        self._lines.step(int(metrics["step"]), numbers)


class _PlainLines:
    """What the bar is on a terminal, elsewhere: every PLAIN_EVERY_S seconds, and at the end, a line with the same."""

    def __init__(self, console: Console, run: RunFolder, first_step: int) -> None:
        self._console, self._name, self._steps = console, run.path.name, run.config.steps
        self._wanted = run.config.track.progress and not console.is_terminal
        self._step, self._numbers = first_step, "starting"
        # Of the first step that was told: from there the pace is known, without what comes before the steps.
        self._clock: tuple[int, float] | None = None
        self._pace_s = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="progress", daemon=True)

    def start(self) -> None:
        """From now on, in a thread: an evaluation may take many times as long as the lines are apart."""
        if self._wanted:
            self._thread.start()

    def stop(self) -> None:
        """The last line."""
        if self._wanted:
            self._over.set()
            self._thread.join()
            self._say()

    def doing(self, what: str) -> None:
        """What takes long just now."""
        self._numbers = what

    def step(self, step: int, numbers: str) -> None:
        """A step is done."""
        self._step, self._numbers, now = step, numbers, time.monotonic()
        if self._clock is None:
            self._clock = step, now
        elif step > self._clock[0]:
            self._pace_s = (now - self._clock[1]) / (step - self._clock[0])

    def _tell(self) -> None:
        while not self._over.wait(PLAIN_EVERY_S):
            self._say()

    def _say(self) -> None:
        left = self._steps - self._step
        ahead = f", {in_words(left * self._pace_s)} left" if left and self._pace_s else ""
        text = f"{self._name}: step {self._step}/{self._steps}, {self._numbers}{ahead}"
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


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
