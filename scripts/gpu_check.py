#!/usr/bin/env python
"""What runs on a GPU, how accurately, how fast, and with how much memory: one GPU, eight minutes.

    python scripts/gpu_check.py --docs docs                        all stages on this machine's GPU, into docs/gpu.md
    python scripts/gpu_check.py --only products losses             some of them again
    python scripts/gpu_check.py --device cpu --small               a dry run without a GPU: tiny sizes, no measurements

Needs no network. Each stage is a process with its own time limit; a failure is reported, and the next stage runs.
Writes into --out: <stage>.jsonl (one row per measurement), <stage>.log (its other output), and, from all rows
present, gpu.json and gpu.md (published as docs/gpu.md). Exit code 1: something failed; 2: bad input.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from gpu.check import ROOT, Row
from gpu.document import document
from gpu.stage import STAGES
from opsd.config.cli import parse
from opsd.config.settings import Settings
from opsd.utils.errors import UserError, exits_on_bad_input


@dataclass(frozen=True)
class Options(Settings):
    """Which stages run, where, and for how long."""

    out: Path = Path("runs/gpu-check")
    """Folder of the results."""
    only: tuple[str, ...] = ()
    """Stages to run; none named: all."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu: for a dry run."""
    small: bool = False
    """Tiny sizes, to see whether it runs at all."""
    seconds: float = 480.0
    """Time limit for all stages together; stages that are left by then are not run."""
    docs: Path | None = None
    """Put gpu.md and gpu.json into this folder too."""


def main(options: Options) -> int:
    """Run the stages and write the document; returns the exit code."""
    check(options)
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.seconds
    for stage in options.only or STAGES:
        run(stage, options, end - time.monotonic())
    rows = read(options.out)
    for folder in filter(None, (options.out, options.docs)):
        (folder / "gpu.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
        (folder / "gpu.md").write_text(document(rows))
    failed = [row for row in rows if "failed" in row]
    for row in failed:
        print(f"failed: {row['stage']}: {row['what']}: {row['failed']}", file=sys.stderr)
    print(f"{len(rows)} rows, {len(failed)} failed: {options.out / 'gpu.md'}")
    return 1 if failed else 0


def check(options: Options) -> None:
    """Raises UserError for what cannot be run."""
    if unknown := [stage for stage in options.only if stage not in STAGES]:
        raise UserError(f"--only {unknown[0]}: give some of {', '.join(STAGES)}")
    if options.docs is not None and not options.docs.is_dir():
        raise UserError(f"--docs {options.docs}: no such folder")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("PyTorch finds no GPU here; give --device cpu --small for a dry run")
    if options.device == "cpu" and not options.small:
        raise UserError("--device cpu is for a dry run; give --small with it")


def run(stage: str, options: Options, seconds_left: float) -> None:
    """Run one stage in its own process group, which ends with it; if the whole stage fails, that is a row."""
    rows, log = (options.out / f"{stage}.{kind}" for kind in ("jsonl", "log"))
    rows.unlink(missing_ok=True)
    # The limits of STAGES are for a GPU.
    limit = seconds_left if options.small else min(STAGES[stage], seconds_left)
    words = [stage, str(options.out.resolve()), options.device, "small" if options.small else "full"]
    print(f"== {stage}, at most {limit:.0f} s", flush=True)
    failed = "the time for all stages was used up" if limit <= 0 else _ended(words, log, limit)
    if failed:
        with rows.open("a") as file:
            file.write(json.dumps({"stage": stage, "what": "the whole stage", "failed": failed}) + "\n")


def _ended(words: list[str], log: Path, limit: float) -> str | None:
    """Start a stage and wait; returns why it failed, or None."""
    paths = [str(ROOT), str(ROOT / "scripts"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "gpu.stage", *words], env=env, stderr=stderr, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"it took more than {limit:.0f} s"
        finally:
            # Also the processes that it started.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    said = log.read_text().strip().splitlines()[-1:] or ["no output"]
    return None if code == 0 else f"exit code {code}: {said[0][:300]}"


def read(out: Path) -> list[Row]:
    """The rows of all stages that have run, in their order."""
    files = [file for stage in STAGES if (file := out / f"{stage}.jsonl").exists()]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


if __name__ == "__main__":
    with exits_on_bad_input("gpu_check"):
        sys.exit(main(parse(Options, sys.argv[1:], "gpu_check", bare_switches=True)))
