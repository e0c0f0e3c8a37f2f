"""What docs/scaling.md shows of plans is what the named commands print today."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs" / "scaling.md").read_text()

pytestmark = pytest.mark.e2e


def printed(*command: str, code: int = 0) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == code, done.stderr
    return done.stdout


def test_the_papers_rows():
    table = printed("scripts/plan_paper.py").strip()
    assert table.count("\n") == 13 and table in DOC


def test_the_example():
    start = DOC.index("`opsd plan --student qwen3-4b") + 1
    command, rest = DOC[start:].split("`", 1)
    block = rest.split("```", 2)[1].strip()
    assert printed("-m", *shlex.split(command), code=1).strip() == block
