"""Bias and soft cap under ZeRO-3: two ranks train what one process trains; see `sharded_heads.py`."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tolerance import close, rounding, transformer

from families import own_kl

pytestmark = pytest.mark.e2e
WORKER = Path(__file__).with_name("sharded_heads.py")
ROOT = WORKER.parents[2]


@pytest.mark.numeric
def test_a_head_with_a_bias_is_trained_in_shards_as_in_one_process(tmp_path):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed: run `make setup`")
    path = os.pathsep.join([str(ROOT / "scripts"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    done = subprocess.run(
        [sys.executable, WORKER, tmp_path],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    losses, ends = [], []
    for name in ("one", "two"):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss/nats"] for line in lines if "loss/nats" in line])
        ends.append(load_file(tmp_path / name / "checkpoints" / "step_2" / "model.safetensors"))
    close(losses[1], losses[0], *transformer(2, 64), 52)
    close(losses[0][0], own_kl(tmp_path / "one", tmp_path / "student", tmp_path / "teacher"), *transformer(2, 64), 52)
    start, (one, two) = load_file(tmp_path / "student" / "model.safetensors"), ends
    moves = [{name: end[name] - start[name] for name in start} for end in (one, two)]
    assert float(moves[0]["lm_head.bias"].abs().max()) > 1e-6
    whole = [torch.cat([move[name].flatten() for name in sorted(start)]) for move in moves]
    assert float((whole[0] - whole[1]).norm()) <= rounding(*transformer(2, 64, backward=2)) * 10 * float(
        whole[0].norm()
    )
