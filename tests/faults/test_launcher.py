"""Two ranks under a real launcher, torchrun: what it does to a run whose processes are struck, and a run to it."""

import contextlib
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from runs import ENVIRONMENT, ROOT, assert_same, flags

pytestmark = pytest.mark.slow
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "opsd", "train"]
STEPS, LIMIT_S = 10, 900.0


@contextlib.contextmanager
def launched(*args: str | Path) -> Iterator[subprocess.Popen[str]]:
    """The launcher with its ranks; whatever it leaves behind is killed at the end."""
    run = subprocess.Popen([*LAUNCH, *map(str, args)], cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        yield run
    finally:
        if run.poll() is None:
            for process in [*ranks_of(run).values(), run]:
                process.kill()
        run.wait()


def to_its_end(*args: str | Path) -> None:
    with launched(*args) as run:
        said = run.communicate(timeout=LIMIT_S)[1]
    assert run.returncode == 0, said


def lines_of(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def ranks_of(launcher: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """Its ranks' processes."""
    children = psutil.Process(launcher.pid).children()
    return {int(child.environ()["RANK"]): child for child in children}


def strike(
    launcher: subprocess.Popen[str], run: Path, lines: int, wait_s: float, rank: int | None
) -> tuple[str, float]:
    """Once so many lines of metrics are written, and a moment later: kill -9 of a rank, or SIGTERM to the launcher.

    What was said, and after how many seconds all had ended. Asserts that no process of the run is left.
    """
    while lines_of(run) < lines:
        assert launcher.poll() is None, launcher.communicate()[1]
        time.sleep(0.01)
    ranks = ranks_of(launcher)
    time.sleep(wait_s)
    struck_s = time.monotonic()
    if rank is None:
        launcher.terminate()
    else:
        ranks[rank].kill()
    said = launcher.communicate(timeout=LIMIT_S)[1]
    took_s = time.monotonic() - struck_s
    assert launcher.returncode != 0
    _, alive = psutil.wait_procs(ranks.values(), timeout=0)
    for process in alive:
        process.kill()
    assert len(ranks) == 2 and not alive
    return said, took_s


@pytest.fixture(scope="module")
def settings() -> list[str]:
    return flags(engine__kind="deepspeed", engine__zero_stage=2, steps=STEPS, checkpoint__keep=1)


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory) -> Path:
    """The run that nothing disturbed."""
    out = tmp_path_factory.mktemp("launcher") / "whole"
    to_its_end(*settings, "--out", out)
    return out


@pytest.mark.fault(
    "kill -9 of one of torchrun's two ranks at a random moment; resumed and killed again, four times in all",
    "torchrun ends within a minute, no process is left; the result matches the undisturbed run bit for bit",
)
def test_ranks_of_a_launcher_that_are_killed(settings, whole, tmp_path, seen):
    run, draw, slowest_s = tmp_path / "run", random.Random(0), 0.0
    args: list[str | Path] = [*settings, "--out", run]
    for life in range(4):
        with launched(*args) as launcher:
            # In the first step of a life, or in its second.
            lines = lines_of(run) + 1 + draw.randrange(2)
            said, took_s = strike(launcher, run, lines, draw.random() * 0.3, rank=life % 2)
        slowest_s = max(slowest_s, took_s)
        assert not (run / "DONE").exists() and "go on with --resume" in said
        args = ["--resume", run]
    to_its_end(*args)
    assert_same(run, whole)
    seen(f"all processes had ended within {slowest_s:.1f} s of the kill")


@pytest.mark.fault(
    "SIGTERM to torchrun itself, as Slurm sends it; then `--resume`",
    "both ranks save and stop, one line says where; the result matches the undisturbed run bit for bit",
)
def test_a_launcher_that_is_told_to_stop(settings, whole, tmp_path, seen):
    run = tmp_path / "run"
    with launched(*settings, "--out", run) as launcher:
        said, took_s = strike(launcher, run, lines=2, wait_s=0.1, rank=None)
    (step,) = re.findall(r"opsd: stopped by SIGTERM after step (\d+), .*/step_\1 is saved; go on with: opsd", said)
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step_{step}"]
    to_its_end("--resume", run)
    assert_same(run, whole)
    seen(f"all processes had ended within {took_s:.1f} s of the signal")
