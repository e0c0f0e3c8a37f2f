"""Runs of the pocket pair: their flags, the command line as a user starts it, and when two runs are the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from forked import Limits, python
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
POCKET = ROOT / "assets" / "pocket"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def flags(**changed: object) -> list[str]:
    """Flags of a run of four short steps that leaves every kind of record; others are given as part__name=value."""
    settings: dict[str, object] = {
        "student": POCKET / "student",
        "teacher": POCKET / "teacher",
        "prompts": POCKET / "train.jsonl",
        "prompt_format": "raw",
        "steps": 4,
        "prompts_per_step": 2,
        "rollout.samples_per_prompt": 2,
        "rollout.max_prompt_tokens": 16,
        "rollout.max_new_tokens": 16,
        "optim.lr": 1e-3,
        "engine.micro_batch_tokens": 64,
        "engine.device": "cpu",
        "eval.suite": f"pocket={POCKET / 'eval.jsonl'}",
        "eval.grader": "suffix",
        "eval.samples": 2,
        "eval.limit": 4,
        "eval.every": 2,
        "checkpoint.every": 2,
        "checkpoint.keep": 9,
        "telemetry.every": 1,
        "telemetry.save_tokens": True,
        "telemetry.top_tokens": 2,
        "telemetry.save_rollouts_every": 1,
        # A selector with a memory, and one mask for each step in the token record.
        "select.by": "soft_or",
        "select.normalise_over": "running",
        "track.progress": False,
        **{name.replace("__", "."): value for name, value in changed.items()},
    }
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def opsd(*args: str | Path, limits: Limits | None = None) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    return python("-m", "opsd", *args, env=ENVIRONMENT, limits=limits)


def started(*args: str | Path, through: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """The same from Python's start on, for what is read as modules are imported. through: a command that starts it."""
    command = [*through, sys.executable, "-m", "opsd", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=900, check=False)


def metrics_of(run: Path) -> list[dict]:
    """The lines of metrics.jsonl without what the clock and the machine decide."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "mem/"))} for line in lines]


def assert_same(ours: Path, theirs: Path) -> None:
    """Every number to the last bit: metrics, masks and statistics of every token, rollouts, evaluations, weights."""
    assert (ours / "DONE").exists()
    assert metrics_of(ours) == metrics_of(theirs)
    for kind in ("tokens", "rollouts", "eval"):
        names = [sorted(path.name for path in (run / kind).iterdir()) for run in (ours, theirs)]
        assert names[0] == names[1]
        for name in names[0]:
            one, other = ours / kind / name, theirs / kind / name
            if kind == "tokens":
                pd.testing.assert_frame_equal(pd.read_parquet(one), pd.read_parquet(other), check_exact=True)
            else:
                assert one.read_text() == other.read_text(), name
    last = max((theirs / "checkpoints").glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))
    for file in ("model.safetensors", "trainer/optimizer.safetensors"):
        one, other = (load_file(run / "checkpoints" / last.name / file) for run in (ours, theirs))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one), file
