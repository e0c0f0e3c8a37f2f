"""`opsd train` on the device: against a CPU, repeated, in bf16, and under every ZeRO stage over NCCL in one process."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from gpu.check import ROOT, Check, Row

ASSETS = ROOT / "assets" / "pocket"
SETTINGS = {
    "--prompt_format": "raw",
    "--prompts_per_step": 16,
    "--rollout.samples_per_prompt": 4,
    "--rollout.max_prompt_tokens": 16,
    "--rollout.max_new_tokens": 40,
    "--optim.lr": "1e-3",
    "--optim.warmup_steps": 1,
    "--engine.micro_batch_tokens": 512,
    "--engine.dtype": "float32",
    "--select.by": "tip_patch.selectors:SoftOr",
    "--select.normalise_over": "batch",
    "--telemetry.save_rollouts_every": 1,
    "--telemetry.every": 0,
    "--track.progress": "False",
    "--eval.grader": "suffix",
}
BF16 = "--engine.dtype bfloat16"
HOST = "--teacher.offload True --teacher.cache host --engine.gradient_checkpointing True"
ZERO = "--engine.kind deepspeed --engine.zero_stage"
OFFLOAD = "--engine.offload_optimizer True"
# fp32 runs, each compared with plain torch: their results differ by rounding only.
IN_FP32 = {
    "ZeRO 2": f"{ZERO} 2",
    "ZeRO 0": f"{ZERO} 0",
    "ZeRO 1": f"{ZERO} 1",
    "ZeRO 3": f"{ZERO} 3",
    "ZeRO 2, optimiser offloaded": f"{ZERO} 2 {OFFLOAD}",
    "ZeRO 3, all offloaded": f"{ZERO} 3 {OFFLOAD} --engine.offload_parameters True",
}
IN_BF16 = {
    "bf16": BF16,
    "bf16, teacher offloaded, states pinned, checkpointed": f"{BF16} {HOST}",
    "bf16, ZeRO 3": f"{BF16} {ZERO} 3",
}
LOSS_NATS = 1e-4
# Runs at a time: a tiny run leaves a card idle most of the time.
SIDE_BY_SIDE = 4


@dataclass(frozen=True)
class Finished:
    """The results of a run. By step: losses in nats and rollouts; then its weights, and its seconds with loading."""

    losses: list[float]
    rollouts: list[str]
    weights: bytes
    seconds: float

    def beside(self, other: Finished) -> Row:
        """Difference of its losses from another's, while both write the same rollouts: rounding may change a draw."""
        pairs = list(zip(self.rollouts, other.rollouts, strict=True))
        same = next((step for step, (own, theirs) in enumerate(pairs) if own != theirs), len(pairs))
        apart = [abs(own - theirs) for own, theirs in zip(self.losses[:same], other.losses[:same], strict=True)]
        return {
            "seconds": self.seconds,
            "steps_with_the_same_rollouts": same,
            "loss_error": max(apart, default=math.inf),
            "same_weights": self.weights == other.weights,
        }


def training(check: Check) -> None:
    """Plain torch and DeepSpeed. In a dry run on a CPU: one of each."""
    with tempfile.TemporaryDirectory() as folder:
        runs = _Runs(Path(folder), steps=2 if check.small else 4)
        on_device = f"--engine.device {check.device}"
        plain = runs.start("plain", on_device)
        on_cpu = runs.start("cpu", "--engine.device cpu") if check.on_cuda else plain
        again = runs.start("again", on_device) if check.on_cuda else plain
        few = 1 if check.small else None
        in_fp32 = {name: runs.start(name, f"{on_device} {more}") for name, more in list(IN_FP32.items())[:few]}
        in_bf16 = (
            {} if check.small else {name: runs.start(name, f"{on_device} {more}") for name, more in IN_BF16.items()}
        )
        check.tried("plain torch beside a CPU", lambda: _beside(plain, on_cpu), LOSS_NATS)
        check.tried("plain torch again", lambda: _beside(again, plain), LOSS_NATS)
        for name, run in in_fp32.items():
            check.tried(f"{name} beside plain torch", lambda run=run: _beside(run, plain), LOSS_NATS)
        for name, run in in_bf16.items():
            check.tried(name, lambda run=run: _alone(run))


def _beside(run: Future[Finished], other: Future[Finished]) -> Row:
    return run.result().beside(other.result())


def _alone(run: Future[Finished]) -> Row:
    return {"seconds": run.result().seconds, "losses": run.result().losses}


class _Runs:
    """Runs of the pocket pair, several at a time."""

    def __init__(self, out: Path, steps: int) -> None:
        self._out, self._steps = out, steps
        self._pool = ThreadPoolExecutor(SIDE_BY_SIDE)

    def start(self, name: str, flags: str) -> Future[Finished]:
        """Start a run as soon as a worker is free."""
        return self._pool.submit(self._finished, self._out / name.replace(" ", "_"), flags.split())

    def _finished(self, run: Path, flags: list[str]) -> Finished:
        start = time.perf_counter()
        self._train(run, flags)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = range(1, self._steps + 1)
        return Finished(
            [line["loss/nats"] for line in lines if "loss/nats" in line],
            [(run / "rollouts" / f"step_{step}.jsonl").read_text() for step in steps],
            (run / "checkpoints" / f"step_{self._steps}" / "model.safetensors").read_bytes(),
            time.perf_counter() - start,
        )

    def _train(self, run: Path, flags: list[str]) -> None:
        models = ["--student", str(ASSETS / "student"), "--teacher", str(ASSETS / "teacher")]
        files = ["--prompts", str(ASSETS / "train.jsonl"), "--out", str(run), "--steps", str(self._steps)]
        settings = [str(word) for pair in SETTINGS.items() for word in pair]
        command = [sys.executable, "-m", "opsd", "train", *models, *files, *settings, *flags]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines()[-1:] or ["no output"]
            raise RuntimeError(f"opsd train ended with {done.returncode}: {said[0]}")
