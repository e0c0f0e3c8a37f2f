"""The real recipe with the real trainer, models and report, in two steps instead of 240."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from forked import python

ROOT = Path(__file__).parents[2]
SHORT = ["--optim.warmup_steps", "1", "--telemetry.every", "1", "--eval.limit", "8", "--eval.samples", "2"]


def recipe(runs: Path, *flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    own = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": os.environ.get("HOME", "/"),
    }
    return subprocess.run(
        ["bash", str(ROOT / "recipes" / "table5_soft_or.sh"), *flags],
        env={**own, "SCALE": "pocket", "RUNS": str(runs), "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
    )


@pytest.mark.e2e
def test_table_5_runs_reports_and_is_not_run_twice(tmp_path):
    runs = tmp_path / "runs"
    done = recipe(runs, *SHORT, STEPS="2", CELLS="all,soft_or-50")
    assert done.returncode == 0, done.stderr
    assert len(list(runs.glob("*/DONE"))) == 2
    (group,) = json.loads((runs / "report" / "table.json").read_text())["groups"]
    (suite,) = group["suites"]
    cells = {(row["cell"]["selector"], row["cell"]["retention"]): row for row in suite["stats"]}
    # The teacher can do the sums, the student mostly not: two steps do not change that.
    assert suite["teacher"]["mean"] > 0.9 and suite["before"]["mean"] < 0.6
    assert cells["all", 1.0]["accuracy"] is not None and cells["soft_or", 0.5]["minus_all"] is not None
    assert cells["entropy_sample", 0.5]["accuracy"] is None  # not run: a gap, never a zero
    kept = {row["cell"]["selector"]: row["kept_frac"] for row in group["costs"] if row["kept_frac"] is not None}
    assert kept["all"] == 1.0 and 0.45 < kept["soft_or"] <= 0.5
    table = (runs / "report" / "table.md").read_text()
    assert "76.7 ± 0.7" in table and "soft_or 50 %" in table  # the paper's numbers stand beside ours
    assert (runs / "report" / "figure.png").stat().st_size > 10_000
    again = recipe(runs, *SHORT, STEPS="2", CELLS="all,soft_or-50")
    assert again.returncode == 0 and again.stdout.count("finished already") == 2


@pytest.mark.e2e
def test_the_example_trains_with_its_own_rule(tmp_path):
    code = (ROOT / "examples" / "distill_with_own_selector.py").read_text()
    short = code.replace("steps=60", "steps=2").replace("warmup_steps=4", "warmup_steps=1")
    short = short.replace('grader="suffix"', 'grader="suffix", limit=4, samples=1').replace(
        '"runs/product"', repr(str(tmp_path / "run"))
    )
    assert short != code
    script = tmp_path / "example.py"
    script.write_text(short)
    done = python(script)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert 0.15 < lines[2]["select/kept_frac"] <= 0.2
