"""Tables: cells that run side by side, and the evaluations that they share."""

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from forked import Command, begin
from runs import ENVIRONMENT, ROOT, assert_same, flags, metrics_of, opsd

RULES, STEPS = ("all", "soft_or"), 16


def table(folder: Path) -> subprocess.Popen[str]:
    """Both cells in two lanes, as a recipe hands them over."""
    words: list[str] = []
    for rule in RULES:
        launch = [sys.executable, "-m", "opsd", "train"]
        command = [*launch, *flags(steps=STEPS, eval__every=0, select__by=rule), "--out", str(folder / rule)]
        words += [rule, str(folder / rule), shlex.join(command), str(len(launch)), str(len(command)), *command]
    process = subprocess.Popen(
        [sys.executable, "scripts/run_cells.py", "--title", "table", "--recipe", "recipe", "--lanes", "2"],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    process.stdin.write("".join(word + "\0" for word in words))
    process.stdin.close()
    process.stdin = None
    return process


def wait_for(what, *processes: subprocess.Popen | Command) -> None:
    end = time.monotonic() + 120
    while not what():
        assert time.monotonic() < end and all(process.poll() is None for process in processes)
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.fault(
    "kill -9 of one of a table's two cells; then the same command",
    "the other cell saves and stops, exit 137 with one line; all cells match the undisturbed ones bit for bit",
)
def test_a_cell_is_killed(tmp_path, seen):
    undisturbed, struck = tmp_path / "undisturbed", tmp_path / "struck"
    process = table(undisturbed)
    _, wrong = process.communicate(timeout=300)
    assert process.returncode == 0, wrong
    process = table(struck)
    metrics = [struck / rule / "metrics.jsonl" for rule in RULES]
    wait_for(lambda: all(file.exists() and len(file.read_text().splitlines()) > 2 for file in metrics), process)
    (cell,) = (one for one in psutil.Process(process.pid).children() if str(struck / "all") in one.cmdline())
    cell.kill()
    _, wrong = process.communicate(timeout=300)
    assert process.returncode == 137 and wrong.startswith("recipe: all failed (ended by SIGKILL; ")
    assert not (struck / "all" / "DONE").exists() and not (struck / "soft_or" / "DONE").exists()
    saved = max(int(path.name.removeprefix("step_")) for path in (struck / "soft_or" / "checkpoints").glob("step_*"))
    process = table(struck)
    said, wrong = process.communicate(timeout=300)
    assert process.returncode == 0 and said.count(": resuming") == 2, wrong
    for rule in RULES:
        assert_same(struck / rule, undisturbed / rule)
    seen(f"the other cell had saved step {saved} of {STEPS}")


@pytest.mark.e2e
@pytest.mark.fault(
    "kill -9 of a run that computes the teacher's evaluation while another run waits for it (`--eval.cache`)",
    "the waiting run, which computed the student's meanwhile, computes it too, and ends like a run that shares nothing",
)
def test_the_maker_of_a_shared_evaluation_is_killed(tmp_path):
    cache = tmp_path / "evaluations"
    own = {"steps": 1, "eval__every": 0, "eval__limit": 64, "eval__samples": 4}

    def run(out: str, **more: object) -> Command:
        return begin("-m", "opsd", "train", *flags(**own, **more), "--out", tmp_path / out, env=ENVIRONMENT)

    maker = run("maker", eval__cache=cache)
    try:
        wait_for(lambda: list(cache.glob("teacher-*.lock")), maker)
        maker.send_signal(signal.SIGSTOP)
        assert not list(cache.glob("*.json"))
        other = run("other", eval__cache=cache)
        wait_for(lambda: list(cache.glob("student-*.json")), other)
        assert not list(cache.glob("teacher-*.json"))
    finally:
        maker.kill()
    assert other.wait(timeout=300) == 0
    (file,) = cache.glob("teacher-*.json")
    assert json.loads(file.read_text())["computed_by"] == str(tmp_path / "other")
    alone = opsd("train", *flags(**own), "--out", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    assert metrics_of(tmp_path / "other") == metrics_of(tmp_path / "alone")
