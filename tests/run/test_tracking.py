"""Where numbers go: the run folder always, a bar where there is a terminal, wandb without a network."""

import contextlib
import json
import os
import re
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from forked import python

from bench.updates import trainer_of
from opsd import train
from opsd.config import TeacherConfig, TrackConfig, TrainConfig
from opsd.run import console
from opsd.run.folder import RunFolder
from opsd.run.tracking import Stopwatch, Tracker, check_trackers, forget_peak, peak_gib
from opsd.utils.distributed import ONE_RANK
from opsd.utils.durations import in_words
from opsd.utils.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def make_run(tmp_path):
    def make(name="run", steps=3, **track):
        return RunFolder.create(
            TrainConfig(
                student="s",
                teacher=TeacherConfig(model="t"),
                prompts="p.jsonl",
                out=str(tmp_path / name),
                steps=steps,
                track=TrackConfig(**track),
            )
        )

    return make


def lines(run):
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def metrics_of(step):
    return {"step": step, "loss/nats": step / 7, "time/step_s": 1.5}


@pytest.mark.parametrize("progress", [True, False])
def test_each_step_is_a_line_of_metrics_as_soon_as_it_is_done(make_run, progress):
    run = make_run(progress=progress)
    with Tracker(run, 0) as tracker:
        for step in (1, 2, 3):
            tracker.step(metrics_of(step))
            assert lines(run) == [metrics_of(done) for done in range(1, step + 1)]
    assert [path.name for path in run.path.iterdir() if path.name not in ("config.json", "metrics.jsonl")] == []


def test_the_bar_shows_the_numbers_that_matter_within_80_columns(make_run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with Tracker(make_run(), 0) as tracker:
        tracker.step({"step": 1, "eval/math500/mean@4": 0.25, "loss/nats": 1.0})
        tracker.step(
            {"step": 2, "loss/nats": 0.12345, "rollout/reward": 0.5, "select/kept_frac": 0.5, "time/step_s": 1.234}
        )
    shown = capsys.readouterr()
    assert shown.out == ""  # standard output is left to results
    # the evaluation of step 1 stays in sight
    for part in ("run", "2/3", "loss 0.123", "reward 0.50", "kept 50%", "step 1.23 s", "math500 25.0%"):
        assert part in " ".join(shown.err.split())


def test_on_a_terminal_the_bar_shows_the_same_and_the_count_uncut(make_run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    with Tracker(make_run(), 0) as tracker:
        tracker.step({"step": 2, "loss/nats": 0.12345, "rollout/reward": 0.5, "time/step_s": 1.234})
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert "2/3" in shown and "loss 0.123" in shown and "step 2/3" not in shown


def test_where_there_is_no_terminal_each_step_has_a_line_but_not_one_after_the_other(make_run, capsys, monkeypatch):
    # Steps end at 100, 103, 110 s: the second is too soon for a line; from the first on a step takes 5 s.
    clock = iter([100.0, 103.0, 110.0])
    with Tracker(make_run(steps=4), 0) as tracker:
        with monkeypatch.context() as patch:
            patch.setattr(console, "time", SimpleNamespace(monotonic=lambda: next(clock)))
            for step in (1, 2, 3):
                tracker.step(metrics_of(step))
        said = capsys.readouterr().err
    assert said.splitlines() == [
        "run: step 1/4, loss 0.143 · step 1.50 s",
        "run: step 3/4, loss 0.429 · step 1.50 s, 5 s left",
    ]
    assert capsys.readouterr().err == ""  # the last line was said already


def test_what_takes_long_is_said_again_and_again(make_run, capsys, monkeypatch):
    monkeypatch.setattr(console, "PLAIN_EVERY_S", 0.005)
    said = ""
    with Tracker(make_run(), 0) as tracker:
        tracker.doing("evaluating the teacher")
        tracker.stage("evaluation")
        while said.count("run: step 0/3, evaluating the teacher · now: evaluation\n") < 2:
            said += capsys.readouterr().err


def test_the_end_says_where_the_model_is(make_run, capsys):
    run = make_run()
    with Tracker(run, 0) as tracker:
        tracker.step(metrics_of(3))
    tracker.finished()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"finished: the model is in {run.path / 'checkpoints' / 'step_3'};")


def test_on_a_terminal_of_80_columns_the_time_left_is_never_cut(make_run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    many = {
        "loss/nats": 1.0,
        "rollout/reward": 0.5,
        "select/kept_frac": 0.5,
        "mem/peak_gib": 10.0,
        "time/step_s": 100.0,
    }
    with Tracker(make_run(), 0) as tracker:
        tracker.step({"step": 1, "eval/math500/mean@4": 0.25, **many})
        tracker.step({"step": 2, **many})
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert re.search(r"2/3 \d:\d\d:\d\d (-:--:--|\d:\d\d:\d\d) loss 1.0", shown), shown


def test_the_line_of_the_end_is_said_however_short_the_run(make_run, capsys):
    with Tracker(make_run(), 0) as tracker:
        tracker.step(metrics_of(1))
    assert capsys.readouterr().err == "run: step 1/3, loss 0.143 · step 1.50 s\n"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (190, "3 min 10 s"),
        (3600, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_spans_of_time_are_short(seconds, words):
    assert in_words(seconds) == words


def test_without_progress_only_what_is_said_is_shown(make_run, capsys):
    with Tracker(make_run(progress=False), 0) as tracker:
        tracker.doing("evaluating")
        tracker.say("7 prompts [too long] were left out")
        tracker.step(metrics_of(1))
    assert capsys.readouterr().err == "7 prompts [too long] were left out\n"


def test_a_resumed_bar_starts_where_the_run_was(make_run, capsys):
    with Tracker(make_run(), 2):
        pass
    assert "2/3" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a[bold]b", "a[/bold]b"])
def test_names_are_shown_as_they_are_not_as_markup(make_run, capsys, name):
    run = make_run()
    run.path.rename(run.path.with_name("moved"))
    run.path = run.path.with_name(name.replace("/", "\N{FRACTION SLASH}"))
    run.path.mkdir()
    with Tracker(run, 0) as tracker:
        tracker.step({"step": 1, f"eval/{name.replace('/', '')}/mean@4": 0.25})
        tracker.doing(name)
    assert name in capsys.readouterr().err


def test_a_stopwatch_adds_up_each_stage(monkeypatch):
    clock = iter([0.0, 0.0, 2.0, 10.0, 13.0, 20.0, 20.5, 21.0])  # rollout 2 s, student 3 s, rollout 0.5 s
    monkeypatch.setattr("opsd.run.tracking.time.perf_counter", lambda: next(clock))
    watch = Stopwatch(CPU)
    for stage in ("rollout", "student", "rollout"):
        with watch.stage(stage):
            pass
    assert watch.metrics() == {"time/rollout_s": 2.5, "time/student_s": 3.0, "time/step_s": 21.0}


def test_peak_memory_is_that_of_the_process_in_gib():
    before = peak_gib(CPU)
    block = torch.ones(2**27)  # 512 MiB of fp32, touched
    grown = peak_gib(CPU)
    del block
    assert 0.05 < before < 64.0
    assert grown >= before
    assert peak_gib(CPU) >= grown - 0.01  # a peak does not go down again, but for counters that lag


# A process of its own: wandb starts a service that outlives a test otherwise, and reads its settings only once.
OFFLINE_RUN = """
import socket, sys
from pathlib import Path
from opsd.run.folder import RunFolder
from opsd.run.tracking import Tracker

def no_network(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
        raise AssertionError(f"connects to {address}")
    return connect(self, address)

connect, socket.socket.connect = socket.socket.connect, no_network
with Tracker(RunFolder.open(Path(sys.argv[1])), 0) as tracker:
    for step in (1, 2):
        tracker.step({"step": step, "loss/nats": 0.5 / step})
"""


@pytest.mark.e2e
def test_wandb_offline_keeps_a_run_in_the_run_folder_and_needs_no_network(make_run):
    run = make_run(wandb="offline", progress=False)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    # no server can be reached through this address, and no key is at hand
    environment |= {"WANDB_BASE_URL": "http://127.0.0.1:9", "HOME": str(run.path.parent), "WANDB_API_KEY": ""}
    done = python("-c", OFFLINE_RUN, run.path, env=environment)
    assert done.returncode == 0, done.stderr
    (folder,) = (run.path / "wandb").glob("offline-run-*")
    (log,) = folder.glob("*.wandb")
    assert log.stat().st_size > 0
    assert b"loss/nats" in log.read_bytes()
    assert [line["step"] for line in lines(run)] == [1, 2]


def test_a_run_folders_wandb_id_is_its_own_and_stays(make_run, monkeypatch):
    import wandb

    started = []
    monkeypatch.setattr(wandb, "init", lambda **settings: started.append(settings) or MagicMock())
    runs = [make_run(name, wandb="offline") for name in ("a/run", "b/run")]
    for run in [*runs, runs[0]]:
        Tracker(run, 0)
    first, second, again = started
    assert first["name"] == second["name"] == "run"
    assert first["id"] == again["id"] != second["id"]  # else two runs would write into one chart
    assert first["resume"] == "allow"
    assert first["mode"] == "offline"
    assert first["config"]["steps"] == 3


@pytest.mark.e2e
def test_wandb_is_neither_imported_nor_needed_when_off(make_run):
    run = make_run(progress=False)
    code = (
        "import sys; from pathlib import Path\n"
        "from opsd.run.folder import RunFolder; from opsd.run.tracking import Tracker\n"
        "with Tracker(RunFolder.open(Path(sys.argv[1])), 0) as tracker: tracker.step({'step': 1})\n"
        "assert 'wandb' not in sys.modules\n"
    )
    done = python("-c", code, run.path)
    assert done.returncode == 0, done.stderr
    assert not (run.path / "wandb").exists()


def test_metrics_reach_wandb_step_by_step_and_a_failed_run_is_marked(make_run, monkeypatch):
    import wandb

    class Recorder:
        def __init__(self):
            self.logged, self.exit_code, self.summary = [], None, {}

        def log(self, metrics, step):
            self.logged.append((step, metrics))

        def finish(self, exit_code):
            self.exit_code = exit_code

    for problem, exit_code in ((None, 0), (RuntimeError("no"), 1)):
        recorder = Recorder()
        monkeypatch.setattr(wandb, "init", lambda recorder=recorder, **_: recorder)
        run = make_run(f"run{exit_code}", wandb="offline", progress=False)
        if problem is None:
            with Tracker(run, 0) as tracker:
                tracker.step(metrics_of(1))
        else:
            with pytest.raises(RuntimeError), Tracker(run, 0) as tracker:
                tracker.step(metrics_of(1))
                raise problem
        assert recorder.logged == [(1, metrics_of(1))]
        assert recorder.exit_code == exit_code


def test_tensorboard_shows_every_number_once_of_a_run_that_was_resumed_too(make_run):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = make_run(tensorboard=True, progress=False)
    for first, steps in ((0, (0, 1, 2, 3)), (1, (2, 3))):  # resumed from the checkpoint of step 1
        with Tracker(run, first) as tracker:
            for step in steps:
                tracker.step({"step": step, "loss/nats": float(10 * first + step)})
    shown = accumulator.EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert shown.Tags()["scalars"] == ["loss/nats"]
    assert [(one.step, one.value) for one in shown.Scalars("loss/nats")] == [(0, 0.0), (1, 1.0), (2, 12.0), (3, 13.0)]


@pytest.mark.parametrize(
    ("track", "said"), [({"tensorboard": True}, "tensorboard True"), ({"wandb": "online"}, "wandb")]
)
def test_a_tracker_that_is_not_installed_is_one_line_before_anything_is_loaded(make_run, monkeypatch, track, said):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"^--track\.{said}[^\n]*: \w+ is not installed; pip install \w+$"):
        check_trackers(make_run(**track).config)
    check_trackers(make_run("none").config)


def test_on_cuda_the_peak_starts_after_loading(monkeypatch):
    allocated, device = [30 * 2**30], torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: allocated.append(2**30))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: allocated[-1])
    trainer = trainer_of(SimpleNamespace(device=device, ranks=ONE_RANK), None)
    trainer.folder = SimpleNamespace(finish=lambda: None)
    seen = []
    monkeypatch.setattr(train, "Tracker", lambda *_: contextlib.nullcontext(MagicMock()))
    monkeypatch.setattr(trainer, "evaluate_before", lambda _: seen.append(peak_gib(device)))
    monkeypatch.setattr(trainer, "train", lambda _: None)
    trainer.run()
    assert seen == [1.0]
    forget_peak(torch.device("cpu"))
    assert len(allocated) == 2
