"""The real problem files, where this checkout has them beside it, and the script as a function."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import prepare_data

SHARED = Path(__file__).parents[3] / "shared" / "data" / "math"

RunScript = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def math_files() -> dict[str, Path]:
    """Name of a set → its real file."""
    files = {
        "dapo": SHARED / "dapo_math_17k.parquet",
        "math500": SHARED / "math500.jsonl",
        "aime24": SHARED / "aime24.jsonl",
        "aime25": SHARED / "aime25.jsonl",
        "gsm8k": SHARED / "gsm8k_test.jsonl",
    }
    if not all(path.is_file() for path in files.values()):
        pytest.skip("needs the real problem files beside this checkout (../shared/data)")
    return files


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunScript:
    """Runs prepare_data.py with these arguments: exit code, stdout, stderr."""

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, args)])
        capsys.readouterr()
        code = 0
        try:
            prepare_data.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out = capsys.readouterr()
        return code, out.out, out.err

    return run
