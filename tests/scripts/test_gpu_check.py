"""`make gpu-check`, as far as it goes without a GPU: its dry run, its rows and its page."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gpu_check
from bench.baselines import Unavailable
from gpu.check import Check
from gpu.document import document
from gpu.stage import STAGES
from gpu_check import Options

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.py"
DRY = ("--device", "cpu", "--small")


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True)


def rows_of(check: Check) -> list[dict]:
    return [json.loads(line) for line in (check.out / f"{check.stage}.jsonl").read_text().splitlines()]


@pytest.fixture
def check(tmp_path) -> Check:
    return Check("environment", tmp_path, torch.device("cpu"), small=True)


@pytest.mark.e2e
def test_the_dry_run_goes_through_every_stage(tmp_path):
    done = run(*DRY, "--out", str(tmp_path), "--docs", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["stage"] for row in rows} == set(STAGES) and not any("failed" in row for row in rows)
    # What TRL's function is asked for is the loss that ours is compared with.
    (trl,) = [row for row in rows if row.get("method") == "trl"]
    assert trl["nats_error"] < 1e-5
    (sharded,) = [row for row in rows if row["what"] == "ZeRO 2 beside plain torch"]
    assert sharded["steps_with_the_same_rollouts"] == 2
    page = (tmp_path / "gpu.md").read_text()
    assert page == document(rows) and "A dry run on a CPU" in page


@pytest.mark.e2e
def test_a_stage_that_fails_is_a_row_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "STAGES", {"unheard_of": 60, "environment": 60})
    assert gpu_check.main(Options(tmp_path, device="cpu", small=True)) == 1
    first, *others = json.loads((tmp_path / "gpu.json").read_text())
    assert first["failed"] == "exit code 1: ModuleNotFoundError: No module named 'gpu.unheard_of'"
    assert {row["stage"] for row in others} == {"environment"} and not any("failed" in row for row in others)
    assert "unheard_of: the whole stage: exit code 1" in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "said"), [(0.01, "it took more than 0 s"), (-1.0, "the time for all stages was")])
def test_a_stage_that_outlasts_its_time_is_stopped_and_said_so(tmp_path, seconds, said):
    options = Options(tmp_path, only=("environment",), device="cpu", small=True, seconds=seconds)
    assert gpu_check.main(options) == 1
    (row,) = json.loads((tmp_path / "gpu.json").read_text())
    assert row["failed"].startswith(said)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(only=("losses", "nothing")), "--only nothing: give some of environment, products"),
        (Options(device="cpu"), "--device cpu is for a dry run; give --small with it"),
        (Options(device="cpu", small=True, docs=Path("nowhere/at/all")), "--docs nowhere/at/all: no such folder"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_is_written(options, message):
    with pytest.raises(gpu_check.UserError, match=message):
        gpu_check.check(options)


@pytest.mark.e2e
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line_and_exit_code_2():
    done = run()
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("gpu_check: PyTorch finds no GPU here; give --device cpu --small")


def test_a_measurement_that_raises_lies_beyond_its_bound_or_is_not_finite_has_failed(check):
    def raises():
        raise ValueError("first line\nsecond line")

    def missing():
        raise Unavailable("not installed")

    check.tried("raises", raises, size=3)
    check.tried("missing", missing)
    check.tried("beyond", lambda: {"error": 0.2, "ms": 1.0}, 0.1)
    check.tried("within", lambda: {"error": 0.05}, 0.1)
    check.tried("not finite", lambda: {"some_error": float("nan")}, 0.1)
    found = {row.pop("what"): row for row in rows_of(check)}
    assert found["raises"] == {"stage": "environment", "size": 3, "failed": "ValueError: first line"}
    assert found["missing"] == {"stage": "environment", "missing": "not installed"}
    assert found["beyond"]["failed"] == "error 0.2, over 0.1" and found["beyond"]["ms"] == 1.0
    assert "failed" not in found["within"]
    assert found["not finite"]["failed"] == "some error nan, over 0.1"


def test_the_page_names_the_card_what_failed_and_what_was_aimed_at():
    loss = {"stage": "losses", "what": "loss", "selector": "all", "divergence": "reverse_kl", "tokens": 16_384}
    rows = [
        {"stage": "environment", "what": "versions", "torch": "2.13.0"},
        {"stage": "environment", "what": "card", "name": "NVIDIA H100", "gib": 79.2, "cuda": "13.0"},
        {**loss, "method": "ours", "ms": 60.0, "peak_gib": 2.5},
        {**loss, "method": "trl", "ms": 120.0},
        {**loss, "method": "liger_triton", "failed": "OutOfMemoryError: 40 GiB"},
    ]
    page = document(rows)
    assert "NVIDIA H100, 79 GiB, CUDA 13.0, PyTorch 2.13.0." in page
    assert "| of TRL's time: at most 0.65 | 0.5 |" in page
    assert "| of Liger's time (Triton): at most 0.65 | - |" in page
    assert "- losses, loss: OutOfMemoryError: 40 GiB" in page


def test_the_documents_page_is_what_its_rows_give():
    rows = ROOT / "docs" / "gpu.json"
    assert (ROOT / "docs" / "gpu.md").read_text() == document(json.loads(rows.read_text()) if rows.exists() else [])
