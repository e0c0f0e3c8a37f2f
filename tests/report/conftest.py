"""Run folders with a handful of problems, whose statistics can be worked out by hand."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from token_runs import write_token_run

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Writes one run folder under tmp_path/runs and returns that folder's parent."""

    def make(
        by: str,
        retention: float,
        scores: dict[str, float],
        *,
        seed: int = 0,
        steps: int = 2,
        done: bool = True,
        suite: str = "pocket",
        metrics: tuple[dict[str, float], ...] = ({"step": 1}, {"step": 2}),
        name: str | None = None,
        best: float | None = None,
        settings: dict[str, dict[str, Any]] | None = None,
    ) -> Path:
        run = tmp_path / "runs" / (name or f"{by}-{retention}-{steps}-seed{seed}")
        (run / "eval").mkdir(parents=True)
        config = {
            "student": "models/s",
            "teacher": {"model": "models/t", "kind": "local"},
            "steps": steps,
            "seed": seed,
            "out": str(run),
            "select": {"by": by, "retention": retention},
        }
        for part, values in (settings or {}).items():
            config[part] = {**config.get(part, {}), **values}
        (run / "config.json").write_text(json.dumps(config))
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
        start = dict.fromkeys(scores, 0.25)
        for file, found in ((f"step_{steps}", scores), ("step_0", start), ("teacher", dict.fromkeys(scores, 1.0))):
            values = {"k": 16, "scores": found} | ({} if best is None else {"best@k": best})
            evaluation: dict[str, Any] = {"model": "m", "suites": {suite: values}}
            (run / "eval" / f"{file}.json").write_text(json.dumps(evaluation))
        if done:
            (run / "DONE").touch()
        return run.parent

    return make


@pytest.fixture
def token_run(tmp_path: Path) -> Callable[..., Path]:
    """See write_token_run."""
    return functools.partial(write_token_run, tmp_path)
