"""Wrong paths, and other trainers' names for our flags: said before any library that takes seconds to load."""

import os
import subprocess
import sys

import pytest

from opsd import __main__ as cli
from opsd.config import TrainConfig
from opsd.config.cli import flags_of
from opsd.config.other_names import _FLAGS_OF, flag_for
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


@pytest.mark.parametrize(
    ("changed", "said"),
    [
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
    ],
)
def test_a_wrong_path_is_said_at_once_models_first(arguments, changed, said):
    done = quick("train", *arguments(**changed))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and said in done.stderr, done.stderr


def test_a_run_that_is_not_there_is_said_at_once(tmp_path):
    done = quick("train", "--resume", tmp_path)
    assert done.returncode == 2 and "no run there" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_hub_name_without_a_hub_is_said_in_a_line_and_not_tried_for_minutes(arguments, tmp_path):
    # nobody listens on port 9
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache")}
    done = quick("train", *arguments(teacher="owner/name"), **nowhere)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "--teacher owner/name: no such folder, not in the hub's cache, and the hub cannot be reached" in done.stderr


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
        ("trainer.save_freq=50", "--checkpoint.every"),
        ("--colour", None),
    ],
)
def test_other_trainers_names_lead_to_ours(theirs, ours):
    assert flag_for(theirs, flags_of(TrainConfig)) == ours


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
