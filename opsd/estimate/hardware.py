"""The hardware that a plan assumes: this machine, measured in about half a second, or a GPU by its data sheet."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from opsd.estimate.rates import product_rate, read_rate
from opsd.utils.errors import UserError

# Shares of the rates of products and of reads that a step reaches: norms, rotary embeddings and sampling take time too.
# On a CPU: docs/performance.md, "Where each part stands". Of a data sheet: assumed.
MEASURED_SHARE, SHEET_SHARE = (0.55, 0.6), (0.4, 0.6)
# Seconds for measuring a product, and again for measuring memory reads.
MEASURE_S = 0.1
# Tokens and the weight's longest side in that product: enough to keep the device busy, and still quick.
MEASURE_SIZES = {"cpu": (256, 2048), "cuda": (4096, 8192)}


class Sheet(NamedTuple):
    """A GPU's memory, dense bf16 arithmetic and memory bandwidth by its data sheet."""

    gib: float
    tflops: float
    bandwidth_gbs: float


SHEETS = {
    "h200": Sheet(131.3, 989.0, 4800.0),
    "h100": Sheet(79.1, 989.0, 3350.0),
    "a100": Sheet(79.1, 312.0, 2039.0),
    "a100-40": Sheet(39.4, 312.0, 1555.0),
    "b200": Sheet(178.0, 2250.0, 8000.0),
    "l40s": Sheet(44.4, 362.0, 864.0),
    "rtx4090": Sheet(23.5, 165.0, 1008.0),
}


@dataclass(frozen=True)
class Hardware:
    """gpus ranks, each with gib of memory. tflops, bandwidth_gbs: the rates that a step is expected to reach.

    kind: cuda or cpu. flash: attention is of variable length. name: as in the verdict, e.g. "this CPU".
    """

    gpus: int
    gib: float
    tflops: float
    bandwidth_gbs: float
    flash: bool
    kind: str
    name: str = "a GPU"


def sheet_hardware(name: str, ranks: int, flash: bool) -> Hardware:
    """A GPU by its data sheet; this machine need not have it."""
    sheet, (arithmetic, reading) = SHEETS[name], SHEET_SHARE
    rates = arithmetic * sheet.tflops, reading * sheet.bandwidth_gbs
    return Hardware(ranks, sheet.gib, *rates, flash, "cuda", f"{'an' if name[0] in 'ahl' else 'a'} {name.upper()}")


def this_hardware(device: str, ranks: int, flash: bool, shape: tuple[int, int]) -> Hardware:
    """This machine: its GPU, or its CPU if `device` is cpu or there is no GPU. shape: the measured product's weight.

    Raises UserError if `device` is cuda and there is no GPU.
    """
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise UserError("--engine.device cuda: there is no CUDA device here; name a GPU, e.g. --hardware h200")
    place = torch.device("cuda" if there and device != "cpu" else "cpu")
    if place.type == "cuda":
        total, name = torch.cuda.mem_get_info(place)[1], f"this {torch.cuda.get_device_name(place)}"
    else:
        # The ranks share the machine.
        threads = torch.get_num_threads()
        total, name = _memory() / ranks, f"this CPU ({threads} thread{'s' * (threads > 1)})"
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    (arithmetic, reading), (tokens, longest) = MEASURED_SHARE, MEASURE_SIZES[place.type]
    sides = min(shape[0], longest), min(shape[1], longest)
    tflops = arithmetic * product_rate([sides], tokens, MEASURE_S, device=place, dtype=dtype) / 1000
    gbs = reading * read_rate(MEASURE_S, device=place)
    _forget_peak()
    spread = 1 if place.type == "cuda" else ranks
    return Hardware(
        ranks, total / 2**30, tflops / spread, gbs / spread, flash and place.type == "cuda", place.type, name
    )


def _forget_peak() -> None:
    """Reset the process's peak memory: the measurement's buffers are freed and must not count towards a run's peak.

    On systems other than Linux, the peak stays.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its container's."""
    limits = [psutil.virtual_memory().total]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(file).read_text().strip() if Path(file).is_file() else ""
        limits += [int(text)] if text.isdigit() else []
    return min(limits)
