"""One stage in its own process: `python -m gpu.stage STAGE OUT DEVICE full|small`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch

from gpu.check import Check

# Each is a function in the module of the same name. Values: time limit on a GPU in seconds. Most important first.
STAGES = {
    "environment": 40,
    "products": 60,
    "exact": 60,
    "losses": 90,
    "attention": 45,
    "update": 110,
    "training": 130,
    "own_tests": 45,
}


def main(stage: str, out: str, device: str, sizes: str) -> None:
    """Run the stage, which reports its rows."""
    torch.manual_seed(0)
    run = getattr(importlib.import_module(f"gpu.{stage}"), stage)
    run(Check(stage, Path(out), torch.device(device), sizes == "small"))


if __name__ == "__main__":
    main(*sys.argv[1:])
