"""The project's own tests that need a GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

from bench.baselines import Unavailable
from gpu.check import ROOT, Check, Row

MARK = "@pytest.mark.gpu"


def own_tests(check: Check) -> None:
    """Run them."""
    check.tried("tests marked gpu", lambda: _run(check))


def _run(check: Check) -> Row:
    if importlib.util.find_spec("pytest") is None:
        raise Unavailable("pytest is not installed")
    files = [str(file) for file in sorted((ROOT / "tests").rglob("test_*.py")) if MARK in file.read_text()]
    if not check.on_cuda:
        raise Unavailable(f"the tests in {len(files)} files need CUDA")
    options = ["-m", "gpu", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files], capture_output=True, text=True, cwd=ROOT, check=False
    )
    last = (done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["no output"])[-1]
    if done.returncode:
        raise RuntimeError(f"pytest ended with {done.returncode}: {last}")
    return {"said": last}
