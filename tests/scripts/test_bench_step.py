"""The step benchmark: every trainer does the same work, to the same loss, and the report has all its numbers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.floor import Rates, Shape, floor

ROOT = Path(__file__).parents[2]


def bench(*flags):
    command = [sys.executable, str(ROOT / "scripts" / "bench_step.py"), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_the_floor_by_hand():
    # A linear layer of 2 × 3 and a head of 10 × 3; 5 prompt tokens, 4 rows of 6 new tokens: 5 + 4·5 = 25 tokens read.
    student, teacher = Shape(6, 10, 3, ((2, 3),)), Shape(12, 10, 5, ((2, 6),))
    found = floor(student, teacher, 5, 4, 6, Rates(gflop_s=1e-9, gb_s=1.0))
    assert found["teacher"] == 2 * 25 * 12 and found["student"] == 3 * 2 * 25 * 6
    assert found["loss"] == 2 * 24 * (3 * 30 + 50)
    assert found["rollout"] == 2 * 5 * 6 + 6 * (2 * 4 * 36)  # products are slower than reading 4 · 36 bytes
    slow_memory = floor(student, teacher, 5, 4, 6, Rates(gflop_s=1e-9, gb_s=1e-10))
    assert slow_memory["rollout"] == pytest.approx(60 + 6 * (4 * 36 / 0.1))


@pytest.mark.slow
@pytest.mark.vllm
def test_trl_and_opsd_train_on_as_many_tokens_and_to_the_same_loss_on_the_same_answers(
    make_folder, make_model, make_tokenizer, tmp_path
):
    pytest.importorskip("vllm")
    pytest.importorskip("trl")
    tokenizer = make_tokenizer(characters="ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789 ,.:?")
    # Sizes that vLLM's kernels take, and no row without a token: TRL would give such a one a probability.
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "head_dim": 32, "max_position_embeddings": 256}
    student, teacher = (make_folder(make_model("llama", seed=seed, **sizes), tokenizer) for seed in (0, 1))
    flags = ("--out", tmp_path, "--student", student, "--teacher", teacher, "--new_tokens", 8, "--rounds", 1)
    done = bench(*flags, "--prompts", 3, "--threads", 1, "--rate_s", 0.01)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "step.json").read_text())
    methods = report["methods"]
    assert set(methods) == {"trl", "opsd-hf", "opsd-vllm"} == set(report["ratio_to_trl"])
    assert {step["tokens"] for found in methods.values() for step in found["steps"]} == {3 * 8}
    # Sums of a few dozen fp32 terms each, over 24 tokens.
    first = {name: found["warm_up"]["loss_nats"] for name, found in methods.items()}
    assert first["trl"] == pytest.approx(first["opsd-hf"], rel=1e-5) and first["trl"] > 0
    for found in methods.values():
        assert all(seconds["wall_s"] >= 0 and seconds["cpu_s"] >= 0 for seconds in found["median"].values())
        assert found["median"]["step"]["wall_s"] >= found["median"]["rollout"]["wall_s"] > 0
    assert {"rollout", "teacher", "student", "sync"} <= set(methods["opsd-vllm"]["median"])
    assert set(report["floor_cpu_s"]) == {"rollout", "teacher", "student", "loss"}
    assert all(seconds > 0 for seconds in report["floor_cpu_s"].values())
    assert report["machine"]["threads"] == 1 and report["machine"]["gflop_s"] > 0
    assert "| opsd-vllm |" in done.stdout and "| floor |" in done.stdout


@pytest.mark.slow
def test_a_trainer_that_fails_is_said_in_one_line(make_folder, make_model, tokenizer, tmp_path):
    folder = make_folder(make_model(), tokenizer)
    flags = ("--out", tmp_path, "--student", folder, "--teacher", folder, "--methods", "opsd-hf", "--lr", "-1")
    done = bench(*flags, "--prompts", 2, "--threads", 1)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("bench_step: ")]
    assert line.startswith("bench_step: opsd-hf failed (UserError: ") and "opsd-hf.log" in line
