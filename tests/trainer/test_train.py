"""Whole runs of tiny random models: what is in the folder, and that a killed run ends like one that was not."""

import json
import signal
from datetime import datetime
from pathlib import Path

import pytest
import torch
from forked import python
from killed import killed_at_step_3
from tolerance import close, transformer
from transformers import AutoModelForCausalLM

from opsd.config import from_json, to_json
from opsd.data import packing as batch
from opsd.eval.command import EvalCommand, evaluate
from opsd.eval.evaluator import Evaluator
from opsd.model import scorer as student
from opsd.rollout import HFRollout
from opsd.run import checkpoint
from opsd.teacher import LocalTeacher
from opsd.train import Trainer, resume, start
from opsd.utils.errors import RunStopped, UserError

SUM_TASKS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(4) for b in range(4)]


@pytest.fixture(scope="session")
def settings(make_folder, make_model, tmp_path_factory):
    """Settings of a four-step run, without its folder; overrides are given by dotted name."""
    data = tmp_path_factory.mktemp("data") / "sums.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in SUM_TASKS))
    student, teacher = make_folder(make_model(seed=0)), make_folder(make_model(seed=1))

    def make(out: Path, **overrides):
        values = {
            "student": str(student),
            "teacher": {"model": str(teacher)},
            "prompts": str(data),
            "out": str(out),
            "steps": 4,
            "prompts_per_step": 3,
            "prompt_format": "raw",
            "rollout": {"samples_per_prompt": 2, "max_prompt_tokens": 8, "max_new_tokens": 6},
            "select": {"by": "soft_or", "normalise_over": "running"},
            "optim": {"lr": 1e-2, "warmup_steps": 1},
            "engine": {"device": "cpu", "micro_batch_tokens": 24},
            "eval": {"suite": [f"sums={data}"], "samples": 2, "grader": "suffix", "limit": 4},
            "checkpoint": {"every": 1, "keep": 2},
            "telemetry": {"every": 2, "save_tokens": True, "save_rollouts_every": 2},
            "track": {"progress": False},
        }
        for name, value in overrides.items():
            part, _, key = name.partition("__")
            if key:
                values[part] = {**values[part], key: value}
            else:
                values[part] = value
        return from_json(values)

    return make


@pytest.fixture(scope="session")
def finished(settings, tmp_path_factory):
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    start(settings(out))
    return out


def metrics_of(run: Path):
    """The lines of metrics.jsonl without what the clock and the machine decide."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "mem/"))} for line in lines]


def weights_of(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def assert_same_run(ours: Path, theirs: Path):
    assert metrics_of(ours) == metrics_of(theirs)
    ours_last, theirs_last = (weights_of(run / "checkpoints" / "step_4") for run in (ours, theirs))
    assert all(torch.equal(ours_last[name], theirs_last[name]) for name in theirs_last)
    for kind in ("eval", "rollouts", "tokens"):
        assert sorted(p.name for p in (ours / kind).iterdir()) == sorted(p.name for p in (theirs / kind).iterdir())
    assert (ours / "eval" / "step_4.json").read_text() == (theirs / "eval" / "step_4.json").read_text()


def test_a_run_folder_holds_what_was_set_measured_and_made(finished):
    assert {p.name for p in finished.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "rollouts",
        "tokens",
        "checkpoints",
        "eval",
        "DONE",
    }
    assert json.loads((finished / "config.json").read_text())["select"]["by"] == "soft_or"
    assert {p.name for p in (finished / "eval").iterdir()} == {"teacher.json", "step_0.json", "step_4.json"}
    assert {p.name for p in (finished / "rollouts").iterdir()} == {f"step_{n}.jsonl" for n in (1, 2, 4)}
    assert {p.name for p in (finished / "checkpoints").iterdir()} == {"step_3", "step_4"}


def test_metrics_have_the_names_users_chart(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    always = {
        "loss/nats",
        "select/kept_frac",
        "student/entropy_nats",
        "optim/grad_norm",
        "optim/lr",
        "mem/peak_gib",
        "rollout/tokens",
        "rollout/truncated_frac",
        "rollout/reward",
        *(f"time/{stage}_s" for stage in ("rollout", "teacher", "student", "sync", "step")),
    }
    assert all(always <= set(line) for line in lines[1:])
    telemetry = {"teacher/entropy_nats", *(f"quadrant/q{n}_frac" for n in (1, 2, 3, 4))}
    assert telemetry <= set(lines[2]) and not telemetry & set(lines[1])
    assert sum(lines[2][f"quadrant/q{n}_frac"] for n in (1, 2, 3, 4)) == pytest.approx(1.0)
    assert {"eval/sums/mean@2", "teacher_eval/sums/mean@2"} <= set(lines[0]) and "eval/sums/mean@2" in lines[4]
    # Six rollouts of six tokens, three of each kept.
    assert all(line["select/kept_frac"] == 0.5 for line in lines[1:] if line["rollout/truncated_frac"] == 1.0)


def test_the_newest_checkpoint_is_a_model_folder_with_other_weights_than_the_start(finished):
    config = json.loads((finished / "config.json").read_text())
    before, after = weights_of(Path(config["student"])), weights_of(finished / "checkpoints" / "step_4")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(finished, settings, tmp_path):
    start(settings(tmp_path / "again"))
    assert_same_run(tmp_path / "again", finished)
    start(settings(tmp_path / "other", seed=1))
    assert metrics_of(tmp_path / "other")[1]["loss/nats"] != metrics_of(finished)[1]["loss/nats"]


KILLER = """
import os, signal, sys, json, torch
import opsd.run.checkpoint, opsd.train
from opsd.config import from_json
place, call, threads, config = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
module, name = {"in the middle of a step": (opsd.train, "distill"),
                "in the middle of a checkpoint": (opsd.run.checkpoint, "save_file")}[place]
whole, calls = getattr(module, name), 0
def killed(*args, **kwargs):
    global calls
    calls += 1
    if calls == call:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*args, **kwargs)
setattr(module, name, killed)
torch.set_num_threads(int(threads))
opsd.train.start(from_json(json.loads(config)))
"""


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("place", "call", "steps_saved"),
    [
        ("in the middle of a step", 2, 0),  # before the first checkpoint: starts anew
        ("in the middle of a step", 8, 2),  # a step has three micro-batches
        ("in the middle of a checkpoint", 3, 2),
    ],
)
def test_a_killed_run_resumes_to_the_same_numbers(finished, settings, tmp_path, place, call, steps_saved):
    run = tmp_path / "killed"
    config = json.dumps(to_json(settings(run)))
    done = python("-c", KILLER, place, str(call), str(torch.get_num_threads()), config)
    assert done.returncode == -signal.SIGKILL, done.stderr
    saved = {p.name for p in (run / "checkpoints").glob("step_*")} if steps_saved else set()
    assert saved == {f"step_{step}" for step in range(1, steps_saved + 1)}
    resume(run)
    assert_same_run(run, finished)


def test_what_was_written_past_the_checkpoint_is_cut_off_not_doubled(finished, settings, tmp_path, monkeypatch):
    run = tmp_path / "broken"
    whole = checkpoint.save

    def save(folder, model, tokenizer, state, *rest):
        if state.step == 4:  # step 3 stands in metrics.jsonl by now, the newest checkpoint is of step 2
            raise KeyboardInterrupt
        return whole(folder, model, tokenizer, state, *rest)

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(KeyboardInterrupt):
        start(settings(run, checkpoint__every=2))
    assert [line["step"] for line in metrics_of(run)] == [0, 1, 2, 3]
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 4, "loss/na')  # a line that was cut short
    monkeypatch.setattr(checkpoint, "save", whole)
    resume(run)
    assert_same_run(run, finished)


@pytest.mark.e2e
def test_a_run_in_groups_of_lengths_resumes_to_the_same_numbers_and_matches_one_packed_run(
    settings, tmp_path, monkeypatch
):
    # Answers of 1 to 24 tokens, and hardly any padding allowed: a micro-batch is several calls of the model.
    monkeypatch.setattr(batch, "PADDING_TOKENS", 2)
    monkeypatch.setattr(batch, "PADDING_SHARE", 0.0)
    groups, whole = [], student.padded_rows
    monkeypatch.setattr(student, "padded_rows", lambda micro: groups.append(rows := whole(micro)) or rows)
    options = {"rollout__max_new_tokens": 24, "engine__micro_batch_tokens": 500, "checkpoint__every": 2}
    start(settings(tmp_path / "whole", **options))
    assert max(len(rows.groups) for rows in groups) > 2

    save = checkpoint.save

    def stop(folder, model, tokenizer, state, *rest):
        if state.step == 4:
            raise KeyboardInterrupt
        return save(folder, model, tokenizer, state, *rest)

    monkeypatch.setattr(checkpoint, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        start(settings(tmp_path / "broken", **options))
    monkeypatch.setattr(checkpoint, "save", save)
    resume(tmp_path / "broken")
    assert_same_run(tmp_path / "broken", tmp_path / "whole")

    monkeypatch.setattr(student, "has_varlen_attention", lambda model: True)
    calls = len(groups)
    start(settings(tmp_path / "packed", **options))
    assert len(groups) == calls
    # The first step, before rounding has moved a weight.
    ours, theirs = (metrics_of(tmp_path / name)[1] for name in ("packed", "whole"))
    for name in ("loss/nats", "optim/grad_norm"):
        close(ours[name], theirs[name], *transformer(2, 16, backward=1))


@pytest.mark.e2e
def test_a_run_that_ended_in_an_evaluation_repeats_the_evaluation_alone(finished, settings, tmp_path, monkeypatch):
    run = tmp_path / "broken"
    whole, steps = Evaluator.run, []

    def evaluate(self, engine, model, step):
        if step == 4:
            raise KeyboardInterrupt
        return whole(self, engine, model, step)

    monkeypatch.setattr(Evaluator, "run", evaluate)
    with pytest.raises(KeyboardInterrupt):
        start(settings(run))
    assert [line["step"] for line in metrics_of(run)] == [0, 1, 2, 3]
    monkeypatch.setattr(Evaluator, "run", whole)
    monkeypatch.setattr(Trainer, "update", lambda *args: steps.append(args))
    resume(run)
    assert not steps
    assert_same_run(run, finished)


class Noon(datetime):
    """The time of day, on a day that tests choose."""

    day = 1

    @classmethod
    def now(cls, tz=None):
        return cls(2024, 1, cls.day, 12)


@pytest.fixture
def daily(settings, make_folder, make_model, make_tokenizer, monkeypatch):
    """Settings of a run whose student's template tells the day, and what makes another day of it."""
    monkeypatch.setattr("opsd.data.template.datetime", Noon)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Noon)
    monkeypatch.setattr(Noon, "day", 1)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d') }}{% for m in messages %}{{ m.content }}{% endfor %}<assistant>"
    student = make_folder(make_model(seed=0), tokenizer)
    options = {"student": str(student), "prompt_format": "chat", "checkpoint__every": 2}
    return lambda out, **others: settings(out, **options, **others), lambda day: setattr(Noon, "day", day)


@pytest.mark.e2e
def test_a_run_goes_on_another_day_with_the_prompts_that_it_began_with(daily, tmp_path, monkeypatch):
    settings, set_day = daily
    start(settings(tmp_path / "whole"))
    run = killed_at_step_3(monkeypatch, settings(tmp_path / "broken"))
    set_day(2)
    resume(run)
    assert_same_run(run, tmp_path / "whole")
    # The same run of the next day asks something else: 0 1 … and 0 2 ….
    start(settings(tmp_path / "next"))
    assert metrics_of(tmp_path / "next") != metrics_of(run)


@pytest.mark.e2e
def test_a_checkpoint_is_evaluated_with_the_prompts_of_its_run(daily, tmp_path, monkeypatch):
    settings, set_day = daily
    config = settings(tmp_path / "run")
    start(config)
    set_day(2)

    def digests(name, model):
        out = tmp_path / f"{name}.json"
        settings = {"model": str(model), "suite": config.eval.suite, "out": str(out), "samples": 1, "max_new_tokens": 4}
        evaluate(EvalCommand(**settings, device="cpu"))
        return json.loads(out.read_text())["settings"]["suite"]

    ours, others = digests("ours", tmp_path / "run" / "checkpoints" / "step_4"), digests("others", config.student)
    assert ours != others
    set_day(3)
    assert digests("others", config.student) == others  # a finished evaluation is found again, whatever the day


@pytest.mark.e2e
@pytest.mark.parametrize("part", ["prompts", "eval.suite sums"])
def test_a_run_whose_prompt_file_was_changed_does_not_go_on(settings, tmp_path, monkeypatch, part):
    files = {name: tmp_path / f"{name}.jsonl" for name in ("prompts", "eval.suite sums")}
    for file in files.values():
        file.write_text("".join(json.dumps(record) + "\n" for record in SUM_TASKS))
    options = {"prompts": str(files["prompts"]), "eval__suite": [f"sums={files['eval.suite sums']}"]}
    run = killed_at_step_3(monkeypatch, settings(tmp_path / "run", **options, checkpoint__every=2))
    files[part].write_text("".join(json.dumps(record) + "\n" for record in reversed(SUM_TASKS)))
    before = (run / "metrics.jsonl").read_text()
    said = rf"^--resume {run}: {files[part]} gives other prompts [^\n]+digest of {part}: \w{{16}}, not \w{{16}}\)"
    with pytest.raises(UserError, match=said):
        resume(run)
    assert (run / "metrics.jsonl").read_text() == before
    # The same records from another place, written otherwise, are the same prompts.
    values = json.loads((run / "config.json").read_text())
    assert values["began"]["digests"].keys() == files.keys()
    moved = tmp_path / "moved.jsonl"
    moved.write_text("".join(json.dumps(record, indent=None, separators=(",", ":")) + "\n\n" for record in SUM_TASKS))
    values["prompts"], values["eval"]["suite"] = str(moved), [f"sums={moved}"]
    (run / "config.json").write_text(json.dumps(values))
    resume(run)


@pytest.mark.e2e
def test_a_run_folder_of_a_version_without_digests_still_resumes(finished, settings, tmp_path, monkeypatch):
    run = killed_at_step_3(monkeypatch, settings(tmp_path / "old", checkpoint__every=2))
    values = json.loads((run / "config.json").read_text())
    del values["began"]
    (run / "config.json").write_text(json.dumps(values))
    resume(run)
    assert_same_run(run, finished)


def test_a_loss_that_is_no_number_stops_with_the_rollouts_saved(settings, tmp_path, monkeypatch):
    whole = LocalTeacher.hidden
    monkeypatch.setattr(LocalTeacher, "hidden", lambda self, batches: [h * torch.nan for h in whole(self, batches)])
    run = tmp_path / "nan"
    with pytest.raises(RunStopped, match="step 1: the teacher's states of 33 tokens are not finite") as stop:
        start(settings(run))
    assert str(stop.value).count("\n") == 0
    assert str(stop.value).endswith("no checkpoint was saved yet; the same command starts it again")
    saved = [json.loads(line) for line in (run / "rollouts" / "stopped_at_step_1.jsonl").read_text().splitlines()]
    assert len(saved) == 6 and all(record["response_ids"] for record in saved)
    assert not (run / "DONE").exists()


def test_the_same_command_begins_a_run_anew_that_failed_in_its_first_step(settings, tmp_path, monkeypatch, capsys):
    config = settings(tmp_path / "run", steps=1)

    def fails(self, *rest):
        raise UserError("the rule is wrong")

    monkeypatch.setattr(Trainer, "update", fails)
    with pytest.raises(UserError, match="the rule is wrong"):
        start(config)
    monkeypatch.undo()
    start(config)
    assert f"its files are in {tmp_path}/run/attempt_1" in " ".join(capsys.readouterr().err.split())
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [0, 1]
    assert (tmp_path / "run" / "attempt_1" / "eval" / "teacher.json").exists()
    with pytest.raises(UserError, match="holds a run already"):
        start(config)


def test_a_run_shorter_than_the_records_are_apart_has_something_to_show(settings, tmp_path):
    apart = {"telemetry": {"every": 10, "save_tokens": True, "save_rollouts_every": 10}, "eval__suite": []}
    start(settings(tmp_path / "run", steps=3, **apart))
    assert {p.name for p in (tmp_path / "run" / "rollouts").iterdir()} == {"step_1.jsonl", "step_3.jsonl"}
    assert [p.name for p in (tmp_path / "run" / "tokens").iterdir()] == ["step_3.parquet"]


def test_resume_of_a_finished_run_or_of_no_run_says_so(finished, tmp_path):
    with pytest.raises(UserError, match="has finished"):
        resume(finished)
    with pytest.raises(UserError, match="no run there"):
        resume(tmp_path)


@pytest.mark.parametrize("scope", ["micro_batch", "rollout", "batch"])
def test_every_scope_trains(settings, tmp_path, scope):
    config = settings(tmp_path / "run", steps=1, select__normalise_over=scope, eval__suite=[], telemetry__every=1)
    start(config)
    (line,) = metrics_of(tmp_path / "run")
    assert 0.4 < line["select/kept_frac"] <= 0.5


def test_bfloat16_trains_fp32_weights(settings, tmp_path):
    start(settings(tmp_path / "run", steps=1, engine__dtype="bfloat16", eval__suite=[]))
    weights = weights_of(tmp_path / "run" / "checkpoints" / "step_1")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_answers_are_written_to_a_growing_horizon_and_evaluations_are_not_cut(settings, tmp_path, monkeypatch):
    asked = []

    class Watched(HFRollout):
        def generate(self, prompts, samples, sampling, seed):
            asked.append(sampling.max_new_tokens)
            return super().generate(prompts, samples, sampling, seed)

    monkeypatch.setattr("opsd.build.sampler.HFRollout", Watched)
    # 6 tokens: ⌊6·(⅓ + ⅔·0)⌋ = 2, ⌊6·(⅓ + ⅔·½)⌋ = 4, then all
    growing = {"rollout__horizon": 1 / 3, "rollout__horizon_steps": 3, "eval__at_start": False, "eval__teacher": False}
    start(settings(tmp_path / "run", **growing))
    assert asked == [2, 4, 6, 6, 6]
    trained = metrics_of(tmp_path / "run")[1:]  # the first line is of what was there before training
    assert trained[0]["rollout/tokens"] <= 12 and trained[1]["rollout/tokens"] <= 24
    assert [line["rollout/horizon_tokens"] for line in trained] == [2, 4, 6, 6]


@pytest.mark.e2e
def test_a_run_that_leaves_out_rock_tokens_resumes_to_the_same_numbers(settings, tmp_path, monkeypatch):
    select = {"by": "rock_bypass", "options": {"after_steps": "1", "most_of_tokens": "0.5"}}
    start(settings(tmp_path / "whole", select=select))
    whole = metrics_of(tmp_path / "whole")
    assert min(line["select/kept_frac"] for line in whole[1:]) < 1.0
    step = Trainer.update

    def dies(self, micros, teacher, number, *rest):
        if number == 3:
            raise KeyboardInterrupt
        return step(self, micros, teacher, number, *rest)

    monkeypatch.setattr(Trainer, "update", dies)
    with pytest.raises(KeyboardInterrupt):
        start(settings(tmp_path / "broken", select=select))
    monkeypatch.undo()
    resume(tmp_path / "broken")
    assert metrics_of(tmp_path / "broken") == whole


@pytest.mark.numeric
def test_rewards_weigh_a_prompts_rollouts(settings, tmp_path):
    common = {"steps": 1, "eval__suite": [], "select": {"by": "all"}, "optim__lr": 1e-9}
    start(settings(tmp_path / "plain", **common))
    start(settings(tmp_path / "weighed", **common, loss={"reward_beta": 0.5}))
    (plain,), (weighed,) = metrics_of(tmp_path / "plain"), metrics_of(tmp_path / "weighed")
    assert plain["rollout/reward"] == weighed["rollout/reward"]
    # Every rollout here is wrong, so a prompt's rollouts are weighed alike: by 1.
    assert weighed["rollout/reward"] == 0.0
    close(weighed["loss/nats"], plain["loss/nats"], 1)
