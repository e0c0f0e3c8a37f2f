"""Wrong paths, and other trainers' names for our flags: said before any library that takes seconds to load."""

import json
import os
import subprocess
import sys

import pytest

from opsd import __main__ as cli
from opsd.config import TrainConfig
from opsd.config.cli import flags_of
from opsd.config.other_names import _FLAGS_OF, flag_for, unit_for
from opsd.eval.command import EvalCommand

# `opsd` with these arguments, which must not get as far as torch.
QUICK = """
import sys
from opsd import __main__ as cli
from opsd.utils import signals

def end(code):
    assert not {"torch", "transformers", "pandas"} & set(sys.modules)
    sys.exit(code)

signals.end = end
cli.main()
"""


def quick(*args, **environment):
    return subprocess.run(
        [sys.executable, "-c", QUICK, *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


@pytest.fixture
def arguments(tmp_path):
    """Arguments of a run whose models lie in `tmp_path`, with these changed."""
    for name in ("student", "teacher"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    flags = {name: tmp_path / name for name in ("student", "teacher", "out")} | {"prompts": tmp_path / "prompts.jsonl"}

    def make(**changed):
        return [word for name, value in (flags | changed).items() for word in (f"--{name}", value)]

    return make


WRONG_PATHS = [
    (
        {"student": "/nowhere", "teacher": "/nor/here", "prompts": "none.jsonl"},
        "--student /nowhere: no such folder",
    ),
    ({"teacher": "/nowhere", "prompts": "none.jsonl"}, "--teacher /nowhere: no such folder"),
    ({"prompts": "none.jsonl"}, "prompt file none.jsonl does not exist"),
    ({"prompts": __file__}, "ends in '.py'; give a .jsonl or .parquet file"),
    ({"eval.suite": "sums=none.jsonl"}, "prompt file none.jsonl does not exist"),
    ({"out": "/"}, "--out / is not empty"),
    ({"steps": 0}, "--steps 0: give a number above 0"),
]


@pytest.mark.parametrize(
    ("changed", "said"), [WRONG_PATHS[0], *(pytest.param(*case, marks=pytest.mark.e2e) for case in WRONG_PATHS[1:])]
)
def test_a_wrong_path_is_said_at_once_models_first(arguments, changed, said):
    done = quick("train", *arguments(**changed))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and said in done.stderr, done.stderr


def test_a_run_that_is_not_there_is_said_at_once(tmp_path):
    done = quick("train", "--resume", tmp_path)
    assert done.returncode == 2 and "no run there" in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.e2e
def test_a_hub_name_without_a_hub_is_said_in_a_line_and_not_tried_for_minutes(arguments, tmp_path):
    # nobody listens on port 9
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache")}
    done = quick("train", *arguments(teacher="owner/name"), **nowhere)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "--teacher owner/name: no such folder, not in the hub's cache, and the hub cannot be reached" in done.stderr


@pytest.mark.e2e
@pytest.mark.parametrize("command", [("eval", "--model"), ("check-model",)])
def test_so_it_is_in_an_evaluation_and_a_check(command, tmp_path):
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache")}
    done = quick(*command, "owner/name", **nowhere)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "owner/name: no such folder, not in the hub's cache, and the hub cannot be reached" in done.stderr


@pytest.mark.e2e
def test_a_data_set_of_the_hub_is_no_file_that_is_looked_for(arguments, tmp_path):
    done = quick("train", *arguments(prompts="hub:owner/sums:train", student="/nowhere"))
    assert "--student /nowhere" in done.stderr


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("soft_xor", "unknown selector 'soft_xor': did you mean 'soft_or'?"),
        ("nowhere:Rule", "selector 'nowhere:Rule' cannot be loaded: no module 'nowhere' here"),
    ],
)
def test_a_selector_that_is_not_there_is_said_at_once(arguments, rule, said):
    done = quick("train", *arguments(**{"select.by": rule}))
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.e2e
def test_a_finished_run_and_a_damaged_one_are_said_at_once(tmp_path):
    values = {"student": "s", "teacher": {"model": "t"}, "prompts": "p", "out": "o", "steps": 3}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "DONE").touch()
    for text, said in (
        (json.dumps(values), "has finished after 3 steps; give --steps N to extend it"),
        (json.dumps({**values, "steps": "3"}), "config.json: steps is '3'; put back what it was"),
        ("{", "config.json is not JSON"),
    ):
        (tmp_path / "config.json").write_text(text)
        done = quick("train", "--resume", tmp_path)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_the_version_is_said(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["opsd", "--version"])
    cli.main()
    assert capsys.readouterr().out.startswith("opsd 0.")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("--lr", "--optim.lr"),
        ("--learning_rate", "--optim.lr"),
        ("--learning-rate=1e-6", "--optim.lr"),
        ("actor_rollout_ref.actor.optim.lr=1e-6", "--optim.lr"),
        ("--max_completion_length", "--rollout.max_new_tokens"),
        ("--num_generations", "--rollout.samples_per_prompt"),
        ("actor_rollout_ref.rollout.n=8", "--rollout.samples_per_prompt"),
        ("TRAIN_BATCH_SIZE", "--prompts_per_step"),
        ("OPD_CHUNK_SIZE", "--loss.chunk_tokens"),
        ("--warmup_ratio", "--optim.warmup_steps"),
        ("--lr_scheduler_type", "--optim.schedule"),
        ("trainer.save_freq=50", "--checkpoint.every"),
        ("--colour", None),
    ],
)
def test_other_trainers_names_lead_to_ours(theirs, ours):
    assert flag_for(theirs, flags_of(TrainConfig)) == ours


@pytest.mark.parametrize(
    ("theirs", "unit"),
    [
        ("--num_train_epochs", "(in optimiser steps, not epochs)"),
        ("--warmup_ratio", "(in steps, not a fraction of them)"),
        ("--gradient_accumulation_steps", "(tokens in each forward pass)"),
        ("--per_device_train_batch_size", "(of all devices together, for one optimiser step)"),
        ("--learning_rate", ""),
    ],
)
def test_a_name_that_counts_something_else_says_what_ours_counts(theirs, unit):
    assert unit_for(theirs) == unit


def test_every_name_leads_to_a_flag_that_is_there():
    known = {*flags_of(TrainConfig), *flags_of(EvalCommand), "--resume"}
    assert {flag for flags in _FLAGS_OF.values() for flag in flags} <= known
    assert flag_for("--num_samples", flags_of(EvalCommand)) == "--samples"


def test_an_unknown_flag_is_answered_with_ours(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["opsd", "train", "--max_completion_length", "64"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    said = "opsd: unknown option --max_completion_length: did you mean --rollout.max_new_tokens?"
    assert capsys.readouterr().err.startswith(said)
