"""Seconds and peak memory of a piece of work: on a CPU from its clocks and the kernel's records, on CUDA from events
and the allocator's records."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# On CUDA the median of this many calls is reported, after one that compiles kernels and fills the allocator.
WARM_CALLS = 3


class Timed(NamedTuple):
    """seconds: wall seconds, on CUDA between two events. cpu_seconds: of this process, over all threads."""

    seconds: float
    cpu_seconds: float
    value: float


class Measured(NamedTuple):
    """Timed, with the peak memory above what was in use before."""

    seconds: float
    cpu_seconds: float
    value: float
    peak_bytes: int


def measure(run: Callable[[], Tensor], device: torch.device) -> Measured:
    """On a CPU, the first call, cold; on CUDA, the median of `WARM_CALLS` calls after a first one."""
    if device.type == "cpu":
        reset_peak()
        resident = status_bytes("VmRSS")
        return Measured(*timed(run, device), status_bytes("VmHWM") - resident)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.reset_peak_memory_stats(device)
    calls = [timed(run, device) for _ in range(WARM_CALLS)]
    middle = sorted(calls)[len(calls) // 2]
    return Measured(*middle, torch.cuda.max_memory_allocated(device) - before)


def timed(run: Callable[[], Tensor], device: torch.device) -> Timed:
    """One call. value: the first number of what it returns."""
    wall, cpu = time.perf_counter(), time.process_time()
    if device.type == "cpu":
        value = float(run().flatten()[0])
        return Timed(time.perf_counter() - wall, time.process_time() - cpu, value)
    torch.cuda.synchronize(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    found = run()
    end.record()
    torch.cuda.synchronize(device)
    return Timed(start.elapsed_time(end) / 1e3, time.process_time() - cpu, float(found.flatten()[0]))


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, median of `WARM_CALLS` after a first one."""

    def act() -> Tensor:
        run()
        return torch.zeros(1)

    act()
    return statistics.median(timed(act, device).seconds for _ in range(WARM_CALLS))


def reset_peak() -> None:
    """Reset the kernel's record of this process's peak memory."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def status_bytes(field: str) -> int:
    """A memory field of this process, as the kernel counts it."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
