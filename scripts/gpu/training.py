"""`opsd train` on the device: against a CPU, repeated, in bf16, and under every ZeRO stage over NCCL in one process."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from gpu.check import ROOT, Check, Row

ASSETS = ROOT / "assets" / "pocket"
SETTINGS = {
    "--student": ASSETS / "student",
    "--teacher": ASSETS / "teacher",
    "--prompts": ASSETS / "train.jsonl",
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
    steps = 2 if check.small else 4
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(SIDE_BY_SIDE) as pool:

        def start(name: str, flags: str = "", device: object = check.device) -> Future[Finished]:
            run = Path(folder) / name.replace(" ", "_")
            return pool.submit(_finished, run, steps, ["--engine.device", str(device), *flags.split()])

        def beside(run: Future[Finished], other: Future[Finished]) -> Callable[[], Row]:
            return lambda: run.result().beside(other.result())

        plain = start("plain")
        on_cpu = start("cpu", device="cpu") if check.on_cuda else plain
        again = start("again") if check.on_cuda else plain
        in_fp32 = {name: start(name, flags) for name, flags in list(IN_FP32.items())[: 1 if check.small else None]}
        in_bf16 = {} if check.small else {name: start(name, flags) for name, flags in IN_BF16.items()}
        check.tried("plain torch beside a CPU", beside(plain, on_cpu), LOSS_NATS)
        check.tried("plain torch again", beside(again, plain), LOSS_NATS)
        for name, run in in_fp32.items():
            check.tried(f"{name} beside plain torch", beside(run, plain), LOSS_NATS)
        for name, run in in_bf16.items():
            check.tried(name, lambda run=run: {"seconds": run.result().seconds, "losses": run.result().losses})


def _finished(run: Path, steps: int, flags: list[str]) -> Finished:
    """A run from its start to its end. Raises RuntimeError where it fails."""
    start = time.perf_counter()
    settings = {**SETTINGS, "--out": run, "--steps": steps}
    command = [sys.executable, "-m", "opsd", "train", *(str(word) for pair in settings.items() for word in pair)]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or ["no output"]
        raise RuntimeError(f"opsd train ended with {done.returncode}: {said[0]}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return Finished(
        [line["loss/nats"] for line in lines if "loss/nats" in line],
        [(run / "rollouts" / f"step_{step}.jsonl").read_text() for step in range(1, steps + 1)],
        (run / "checkpoints" / f"step_{steps}" / "model.safetensors").read_bytes(),
        time.perf_counter() - start,
    )
