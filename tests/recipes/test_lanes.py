"""The cells of a table in lanes: side by side, stopped together, resumed by the same command, shown by one display."""

import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from lanes import board as board_module
from lanes.around import Around, evaluations_made
from lanes.board import Board, short, time_left
from lanes.cell import Cell, Progress, read_cells
from run_cells import Life

# A stand-in for `opsd` that makes a run folder, then does what its text says; $cell is the cell's name without pair and
# seed, $run its folder. `await FILE` waits for a file of the project; one that never comes is exit code 9.
CELL = """#!/bin/bash
echo "$(basename "$0") $*" >>calls
while (($#)); do
    [[ $1 == --out || $1 == --resume ]] && run=$2
    shift
done
cell=${run##*/pocket-} cell=${cell%%-seed*}
mkdir -p "$run"
echo '{}' >"$run/config.json"
await() {
    for _ in {1..600}; do [[ ! -e $1 ]] || return 0; sleep 0.05; done
    exit 9
}
"""
DONE = '\ntouch "$run/DONE"\n'
# What opsd does at SIGTERM: it saves, says so in a line, and ends with 143.
SAVES = "trap 'touch \"saved-$cell\"; echo opsd: stopped by SIGTERM >&2; exit 143' TERM\n"


def program(project, text: str) -> None:
    project.program("opsd", CELL + text)


def begin(project, **env: str) -> subprocess.Popen[str]:
    """Table 5 of pocket scale with two lanes, in the background, in a process group of its own."""
    path = f"{project.bin}{os.pathsep}/usr/bin{os.pathsep}/bin"
    return subprocess.Popen(
        ["bash", str(project.root / "recipes" / "table5_soft_or.sh")],
        env={"PATH": path, "SCALE": "pocket", "LANES": "2", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
        start_new_session=True,
    )


def wait_for(*files: Path) -> None:
    end = time.monotonic() + 60
    while not all(file.exists() for file in files):
        assert time.monotonic() < end, files
        time.sleep(0.02)


def test_two_lanes_run_two_cells_at_once_and_the_next_one_as_soon_as_a_lane_is_free(project):
    # The first two wait for each other; the first then for the last of five: the second lane must take all the others.
    program(
        project,
        'touch "begun-$cell"\n'
        "case $cell in\n"
        "    all) await begun-entropy_sample-50; await begun-soft_or-20 ;;\n"
        "    entropy_sample-50) await begun-all ;;\n"
        f"esac{DONE}",
    )
    done = project.run(SCALE="pocket", LANES="2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [call.split()[0] for call in project.calls()] == ["opsd"] * 5 + ["python"]
    ends = re.findall(r"^\[(\d)/5\] pocket-\S+: done in \d+ s$", done.stdout, flags=re.MULTILINE)
    assert ends[:3] == ["2", "3", "4"] and sorted(ends) == list("12345")


def test_one_lane_runs_one_cell_at_a_time_in_the_order_of_the_dry_run(project):
    program(project, f"[[ ! -e busy ]] || exit 9\ntouch busy\nsleep 0.1\nrm busy{DONE}")
    printed = project.run(SCALE="pocket", DRY_RUN="1", LANES="1").stdout.splitlines()
    done = project.run(SCALE="pocket", LANES="1")
    assert done.returncode == 0, done.stderr
    assert project.calls() == printed


def test_what_a_cell_says_is_in_its_own_file_and_not_on_the_recipes_output(project):
    program(project, f'echo "from $cell"; echo "of $cell" >&2{DONE}')
    done = project.run(SCALE="pocket", CELLS="all,soft_or-50")
    assert done.returncode == 0 and "from" not in done.stdout + done.stderr
    logs = sorted((project.root / "runs" / "table5").glob("*.log"))
    assert [log.read_text() for log in logs] == ["from all\nof all\n", "from soft_or-50\nof soft_or-50\n"]


def test_all_cells_run_though_nobody_reads_how_far_they_are(project):
    program(project, f'touch "begun-$cell"; await gone{DONE}')
    recipe = begin(project, LANES="1")
    assert recipe.stdout is not None and recipe.stderr is not None
    wait_for(project.root / "begun-all")
    recipe.stdout.close()
    recipe.stderr.close()
    (project.root / "gone").touch()
    recipe.wait(60)
    assert len(list((project.root / "runs" / "table5").glob("*/DONE"))) == 5
    assert project.calls()[-1].startswith("python")  # the report


@pytest.mark.e2e
def test_a_cell_that_fails_stops_the_others_cleanly_and_the_same_command_goes_on(project):
    stop = "case $cell in\n    all) await ready; echo progress; echo opsd: the disk is full >&2; exit 3 ;;\n"
    program(project, f"{SAVES}{stop}    *) touch ready; await never ;;\nesac{DONE}")
    done = project.run(SCALE="pocket", LANES="2")
    assert done.returncode == 3
    run = "runs/table5/pocket-all-seed0"
    assert done.stderr.splitlines() == [
        f"table5_soft_or.sh: pocket-all-seed0 failed (exit code 3; its output: {run}.log); the same command continues",
        "opsd: the disk is full",
    ]
    assert (project.root / "saved-entropy_sample-50").exists()
    assert len(project.calls()) == 2  # no cell after the one that failed, no report
    (project.root / "calls").unlink()
    program(project, DONE)
    again = project.run(SCALE="pocket", LANES="1")
    assert again.returncode == 0, again.stderr
    resumed = [f"opsd train --resume runs/table5/pocket-{cell}-seed0" for cell in ("all", "entropy_sample-50")]
    assert project.calls()[:2] == resumed and len(project.calls()) == 6


@pytest.mark.e2e
def test_a_cell_without_a_line_of_its_own_shows_the_end_of_what_it_said(project):
    program(project, "for n in {1..30}; do echo line $n; done\nexit 1\n")
    done = project.run(SCALE="pocket", CELLS="all")
    assert done.returncode == 1 and done.stderr.splitlines()[1:] == [f"line {n}" for n in range(19, 31)]
    program(project, "echo again\nexit 1\n")  # what an earlier start said is not shown again
    assert project.run(SCALE="pocket", CELLS="all").stderr.splitlines()[1:] == ["again"]


@pytest.mark.e2e
def test_a_cell_that_is_killed_gives_the_shells_exit_code_and_is_resumed(project):
    program(project, f"[[ -e again ]] || {{ touch again; kill -9 $$; }}{DONE}")
    done = project.run(SCALE="pocket", CELLS="all")
    assert done.returncode == 137 and "failed (ended by SIGKILL; its output: " in done.stderr
    done = project.run(SCALE="pocket", CELLS="all")
    assert done.returncode == 0 and "[1/1] pocket-all-seed0: resuming" in done.stdout


@pytest.mark.e2e
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("to", ["recipe", "group"])
def test_a_signal_to_the_recipe_has_every_cell_save_and_its_end_waited_for(project, number, to):
    # Ctrl-C reaches the group of processes, `kill` the recipe alone. Saving takes a while.
    slow = SAVES.replace("touch", "sleep 0.5; touch")
    program(project, f'{slow}touch "ready-$cell"\n[[ -e again ]] || await never{DONE}')
    process = begin(project)
    wait_for(*(project.root / f"ready-{cell}" for cell in ("all", "entropy_sample-50")))
    (os.killpg if to == "group" else os.kill)(process.pid, number)
    said, wrong = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert all((project.root / f"saved-{cell}").exists() for cell in ("all", "entropy_sample-50"))
    assert "stopping pocket-all-seed0, pocket-entropy_sample-50-seed0: saving checkpoints" in said
    (line,) = wrong.splitlines()
    assert re.fullmatch(r"table5_soft_or.sh: stopped by SIG\w+; the same command continues", line)
    assert len(project.calls()) == 2
    (project.root / "again").touch()
    done = project.run(SCALE="pocket", LANES="2")
    assert done.returncode == 0 and done.stdout.count("resuming") == 2


@pytest.mark.e2e
def test_a_second_signal_is_passed_on(project):
    twice = 'trap \'touch "told-$cell"; trap "exit 99" TERM; while :; do sleep 0.05; done\' TERM\n'
    program(project, f'{twice}touch "ready-$cell"\nawait never{DONE}')
    process = begin(project, CELLS="all")
    wait_for(project.root / "ready-all")
    process.send_signal(signal.SIGTERM)
    wait_for(project.root / "told-all")
    # Signals within a second count as one: a terminal's reaches us twice.
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        time.sleep(1.1)
    process.communicate()
    assert process.returncode == 143


def test_what_a_cells_first_process_leaves_behind_is_ended_and_waited_for(project):
    # As a launcher that was killed leaves its ranks.
    child = "trap 'sleep 0.3; touch child-saved; exit' TERM; touch child-ready; await never"
    program(project, f"if [[ $cell == all ]]; then ( {child} ) & await child-ready; kill -9 $$; fi{DONE}")
    done = project.run(SCALE="pocket", CELLS="all")
    assert done.returncode == 137 and (project.root / "child-saved").exists()


def test_what_ends_before_its_signal_is_sent_is_left_alone(monkeypatch):
    with subprocess.Popen(["sleep", "60"]) as child:
        gone = psutil.Process(child.pid)
        child.kill()
    life = Life(None, child, None, 0)
    monkeypatch.setattr(life, "leftovers", lambda: [gone])
    life.strike(signal.SIGTERM)


@pytest.mark.e2e
def test_a_cell_that_outlives_its_killed_recipe_is_not_run_a_second_time(project):
    program(project, f'touch "ready-$cell"\nawait release{DONE}')
    process = begin(project, CELLS="all")
    wait_for(project.root / "ready-all")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = project.run(SCALE="pocket", CELLS="all")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "pocket-all-seed0 is being run by another recipe, or by leftovers of a killed one" in done.stderr
    (project.root / "release").touch()
    wait_for(project.root / "runs" / "table5" / "pocket-all-seed0" / "DONE")
    assert project.run(SCALE="pocket", CELLS="all").returncode == 0 and len(project.calls()) == 2


def test_the_other_cells_folders_are_looked_at_before_any_cell_starts(project):
    made = project.root / "runs" / "table5" / "pocket-soft_or-20-seed0.command"
    made.parent.mkdir(parents=True)
    made.write_text("another command\n")
    done = project.run(SCALE="pocket")
    assert done.returncode == 2 and "was made by another command" in done.stderr and project.calls() == []


# The display.


def cell(tmp_path: Path, name: str, steps: int = 240, label: str = "[1/1]") -> Cell:
    command = ("opsd", "train", "--steps", "7", "--steps", str(steps))
    return Cell(name, tmp_path / name, "line", command[:2], command, label)


def write(one: Cell, *lines: dict) -> None:
    one.run.mkdir(exist_ok=True)
    with (one.run / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def test_cells_read_back_from_the_words_that_the_recipe_writes():
    words = ["a-seed0", "runs/a-seed0", "opsd train --x 'y z'", "2", "4", "opsd", "train", "--x", "y z"]
    words += ["b-seed0", "runs/b-seed0", "opsd train", "2", "2", "opsd", "train"]
    first, second = read_cells("".join(word + "\0" for word in words))
    assert (first.name, first.run, first.line) == ("a-seed0", Path("runs/a-seed0"), "opsd train --x 'y z'")
    assert (first.launch, first.command) == (("opsd", "train"), ("opsd", "train", "--x", "y z"))
    assert (first.label, second.label, second.command) == ("[1/2]", "[2/2]", ("opsd", "train"))
    assert read_cells("") == []


def test_time_left_is_that_of_cells_which_wait_for_the_first_free_lane():
    # Lanes are free after 10 and 30 s; two cells of 15 s go into the first: 10 + 15 = 25, before 30; 25 + 15 = 40.
    assert time_left([10.0, 30.0], [15.0, 15.0], 2) == 40.0
    assert time_left([10.0], [], 2) == 10.0
    assert time_left([], [5.0, 5.0, 5.0], 2) == 10.0
    assert time_left([], [], 2) == 0.0


def test_progress_reads_whole_lines_as_they_come_and_anew_after_a_cut(tmp_path):
    one = cell(tmp_path, "one", steps=3)
    progress = Progress(one)
    progress.look()
    assert (progress.step, progress.step_s, progress.numbers) == (0, None, "starting, evaluating")
    write(one, {"step": 0, "eval/sums/mean@4": 0.25})
    file = one.run / "metrics.jsonl"
    with file.open("a") as stream:
        stream.write('{"step": 1, "loss/na')
    progress.look()
    assert (progress.step, progress.step_s, progress.numbers) == (0, None, "sums 25.0 %")
    with file.open("a") as stream:
        stream.write('ts": 0.5, "rollout/reward": 0.75, "time/step_s": 2.0}\n')
    write(one, {"step": 2, "loss/nats": 0.25, "time/step_s": 4.0})
    progress.look()
    assert (progress.step, progress.step_s) == (2, 3.0)  # the median of 2 and 4
    assert progress.numbers == "loss 0.250, reward 0.75, sums 25.0 %"
    (one.run / "checkpoints" / "step_3").mkdir(parents=True)
    assert progress.numbers.startswith("evaluating, ")
    file.write_text('{"step": 0}\n')  # as a resume without a checkpoint cuts it
    progress.look()
    assert (progress.step, progress.step_s) == (0, None)


@pytest.fixture
def table(tmp_path) -> list[Cell]:
    """Five cells with long names; the first is done, the second and third are at steps 100 and 50 of 240, 2 s each."""
    rules = ("all", "entropy_sample-50", "entropy_sample-20", "soft_or-50", "soft_or-20")
    cells = [
        cell(tmp_path, f"pocket-{rule}-optim.beta2_0.95-seed12", label=f"[{n}/5]")
        for n, rule in enumerate(rules, start=1)
    ]
    for one, steps in zip(cells, (240, 100, 50), strict=False):
        numbers = {"loss/nats": 0.5, "rollout/reward": 0.5, "eval/pocket/mean@16": 0.25, "time/step_s": 2.0}
        write(one, {"step": 0}, *({"step": step, **numbers} for step in range(1, steps + 1)))
    (cells[0].run / "DONE").touch()
    return cells


def test_on_a_terminal_of_80_columns_one_display_shows_the_whole_and_every_running_cell_with_the_time_left(table):
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    board = Board("sweep_retention_of_a_long_name", table, 2, console)
    board.look()
    for one in table[1:3]:
        board.begin(one)
    shown = Console(file=io.StringIO(), width=80, color_system=None)
    shown.print(board._render())
    lines = shown.file.getvalue().splitlines()
    assert len(lines) == 3 and all(len(line) <= 80 for line in lines)
    # Left: 280 and 380 s run, then 480 s in the lane that is free after 280, and 480 in the other: 860 s.
    assert lines[0].endswith("step 390/1200  1/5 cells  14 min 20 s left")
    assert lines[1].rstrip().endswith("loss 0.500, reward 0.50, pocket 25.0 %")
    assert "[2/5] pocket-entro" in lines[1] and "95-seed12" in lines[1] and "100/240  loss" in lines[1]
    assert "50/240" in lines[2] and console.file.getvalue() == ""


def test_where_there_is_no_terminal_lines_say_what_starts_and_ends_and_how_far_the_whole_is(table, monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=False, width=40)

    def said() -> list[str]:
        text = console.file.getvalue()
        console.file = io.StringIO()
        return text.splitlines()

    with Board("table5", table, 1, console) as board:
        board.begin(table[1])
        assert said() == [f"[2/5] {table[1].name}"]
        board.look()
        assert said() == []  # the 30 seconds are not over
        monkeypatch.setattr(board_module, "PLAIN_EVERY_S", 0.0)
        board.look()
        # Left in one lane: 140 steps of 2 s, then 190, 240 and 240: 1620 s.
        assert said() == ["table5: step 390/1200, 1 of 5 cells done, 27 min 00 s left"]
        board.end(table[1])
        assert said() == [f"[2/5] {table[1].name}: done in 0 s, pocket 25.0 %"]


def test_time_left_has_the_start_of_cells_that_wait_and_the_last_evaluation_of_all(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(board_module.time, "monotonic", lambda: clock[0])
    one, two = cell(tmp_path, "one", steps=10), cell(tmp_path, "two", steps=10)
    two = dataclasses.replace(two, command=(*two.command, "--eval.cache", "evaluations"))
    board = Board("table", [one, two], 1, Console(file=io.StringIO(), force_terminal=True))
    board.begin(one)
    (one.run / "eval").mkdir(parents=True)
    for second, file, text in (
        (7.0, "config.json", "{}"),
        (19.0, "eval/teacher.json", "{}"),
        (31.0, "eval/step_0.json", "{}"),
        (31.0, "metrics.jsonl", '{"step": 0}\n{"step": 1, "time/step_s": 2.0}\n'),
    ):
        clock[0] = second
        (one.run / file).write_text(text)
        board.look()
    # Nine steps of 2 s and an evaluation, which took (31 - 7) / 2; then 7 s, ten steps and another one: the second cell
    # takes the evaluations before training from the cache.
    assert board._left() == (9 * 2 + 12) + (7 + 10 * 2 + 12)
    write(one, *({"step": step, "time/step_s": 2.0} for step in range(2, 11)))
    clock[0] = 54.0
    board.look()
    assert board._left() == 7 + 10 * 2 + 12  # the last line comes behind the last evaluation
    board.end(one)  # 23 s after the first step was seen: nine steps of 2 s, and 5 s for what follows
    assert board._left() == 7 + 10 * 2 + 5
    clock[0] = 57.0
    board.begin(two)
    clock[0] = 60.0
    board.look()
    assert board._left() == (7 - 3) + 10 * 2 + 5


def test_an_evaluation_from_the_cache_says_nothing_of_what_one_takes(tmp_path):
    one, around = cell(tmp_path, "one"), Around()
    (one.run / "eval").mkdir(parents=True)
    for name, maker in (("teacher", "another/run"), ("step_0", str(one.run))):
        (one.run / "eval" / f"{name}.json").write_text(json.dumps({"shared": {"computed_by": maker}}))
    assert evaluations_made(one) == 1
    around.started(one, 7.0)
    around.evaluated(one, 20.0)
    assert (around.start_s, around.before_s, around.after_s) == (7.0, 13.0, 13.0)
    (one.run / "eval" / "step_0.json").unlink()
    around.evaluated(one, 8.0)
    assert (around.before_s, around.after_s) == (13.0, 13.0)


def test_a_long_name_keeps_its_beginning_and_its_seed():
    assert short("pocket-all-seed0") == "pocket-all-seed0"
    shortened = short("pocket-soft_or-50-optim.beta2_0.95-seed3")
    assert shortened == "pocket-soft_…_0.95-seed3" and len(shortened) == 24


@pytest.mark.slow
def test_ctrl_c_to_a_real_table_saves_and_the_same_command_goes_on_to_the_report(tmp_path):
    root = Path(__file__).parents[2]
    flags = "--optim.warmup_steps 1 --eval.limit 4 --eval.samples 1 --telemetry.every 9 --checkpoint.every 0"
    own = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    own |= {"SCALE": "pocket", "CELLS": "all,entropy_sample-50", "LANES": "2", "STEPS": "8", "RUNS": str(tmp_path)}
    own["HOME"] = os.environ.get("HOME", "/")
    command = ["bash", str(root / "recipes" / "table5_soft_or.sh"), *flags.split()]

    def steps() -> list[list[int]]:
        texts = [file.read_text() for file in sorted(tmp_path.glob("*/metrics.jsonl"))]
        return [[json.loads(line)["step"] for line in text.splitlines()] for text in texts]

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, env=own, **pipes, start_new_session=True)
    while not any(len(done) > 2 for done in steps()):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 130 and "; the same command continues" in said, said
    assert not all((file.parent / "DONE").exists() for file in tmp_path.glob("*/config.json"))
    done = subprocess.run(command, env=own, capture_output=True, text=True)
    assert done.returncode == 0 and "resuming" in done.stdout, done.stdout + done.stderr
    assert steps() == [list(range(9))] * 2 and (tmp_path / "report" / "report.html").exists()
    # The teacher's evaluation, and the student's before training, were made once for both cells; the report takes their
    # folder for no run.
    assert len(list((tmp_path / "evaluations").glob("*.json"))) == 2
