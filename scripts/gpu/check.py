"""The context of a stage: its device, its sizes, and the rows that it reports."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.baselines import Unavailable
from opsd.utils.errors import first_line

Row = dict[str, Any]
ROOT = Path(__file__).parents[2]
# Largest relative error of a result, in the 2-norm: of fp32 sums (tensor cores truncate instead of rounding, which
# gives up to 2e-5 over 4,096 terms), and of results rounded to bf16.
FP32_ERROR, BF16_ERROR = 1e-4, 8e-3
SHOWN_KERNELS = 5


@dataclass(frozen=True)
class Sizes:
    """vocabs: rows of Qwen3's head, and its (odd) number of tokens. tokens: of a micro-batch. widths: hidden sizes of
    student and teacher. chunks: tokens."""

    vocabs: tuple[int, int] = (151_936, 151_669)
    tokens: int = 16_384
    widths: tuple[int, int] = (2560, 4096)
    chunks: tuple[int, int] = (512, 2048)


SMALL = Sizes((512, 509), 64, (32, 48), (16, 32))


@dataclass(frozen=True)
class Check:
    """stage: its name. out: folder of all stages; rows go to <stage>.jsonl there. small: use a dry run's sizes."""

    stage: str
    out: Path
    device: torch.device
    small: bool

    @property
    def sizes(self) -> Sizes:
        """The paper's sizes, or those of a dry run."""
        return SMALL if self.small else Sizes()

    @property
    def on_cuda(self) -> bool:
        """Whether the stage runs on a GPU."""
        return self.device.type == "cuda"

    def say(self, what: str, **values: Any) -> None:
        """Add a row, on disk and on the console."""
        line = json.dumps({"stage": self.stage, "what": what, **values})
        with (self.out / f"{self.stage}.jsonl").open("a") as rows:
            rows.write(line + "\n")
        print(line, flush=True)

    def tried(self, what: str, measure: Callable[[], Row], error_at_most: float = math.inf, **about: Any) -> None:
        """Report what measure() returned, why it raised, or which value named …error exceeds the bound.

        failed: something is wrong. missing: what could not be measured here.
        """
        try:
            found: Row = measure()
        except Unavailable as error:
            found = {"missing": str(error)}
        except Exception as error:  # any error goes into the row, and the next row is tried
            found = {"failed": f"{type(error).__name__}: {first_line(error)[:300]}"}
        errors = {name: float(value) for name, value in found.items() if name.endswith("error")}
        over = [name for name, value in errors.items() if not value <= error_at_most]
        if over:
            found["failed"] = f"{over[0].replace('_', ' ')} {errors[over[0]]:.2g}, over {error_at_most:g}"
        self.say(what, **about, **found)
        if self.on_cuda:
            torch.cuda.empty_cache()

    def kernels(self, run: Callable[[], object]) -> Row:
        """A call's slowest CUDA kernels, with their ms; nothing on a CPU."""
        if not self.on_cuda:
            return {}
        from torch.profiler import ProfilerActivity, profile

        run()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            run()
            torch.cuda.synchronize()
        found = sorted(seen.key_averages(), key=lambda kernel: -kernel.self_device_time_total)[:SHOWN_KERNELS]
        return {"kernels": {kernel.key[:80]: kernel.self_device_time_total / 1e3 for kernel in found}}


def relative(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖, in fp64; NaN if anything is NaN or infinite."""
    exact = exact.double()
    return float((found.double() - exact).norm() / exact.norm())
