"""The command line as a user meets it: bad input is one line and exit code 2, and writes nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from opsd import __main__ as cli


@pytest.fixture(scope="module")
def folders(make_folder, make_model, make_tokenizer, tmp_path_factory):
    """Placeholders of the cases below, as paths."""
    data = tmp_path_factory.mktemp("data")
    files = {
        "prompts": '{"prompt": "1+1=", "answer": "2"}\n',
        "unanswered": '{"prompt": "1+1="}\n',
        "empty": "",
        "malformed": '{"prompt": "1+1="}\n{"prompt": \n',
        "nofield": '{"question": "1+1="}\n',
        "blank": '{"prompt": ""}\n',
        "long": json.dumps({"prompt": "1" * 30}) + "\n",
        "text": "1+1=\n",
    }
    found = {}
    for name, content in files.items():
        found[name] = data / (f"{name}.txt" if name == "text" else f"{name}.jsonl")
        found[name].write_text(content)
    found["model"] = make_folder(make_model())
    found["nochat"] = make_folder(make_model(), make_tokenizer(chat=False))
    found["other"] = make_folder(make_model(), make_tokenizer("9876543210abcdefghijklmnopqrstuvwxyz +-=?.;"))
    damaged = make_model()
    damaged.get_input_embeddings().weight.data[7] = float("nan")
    found["damaged"] = make_folder(damaged)
    found["nothing"] = data / "nothing"
    found["folder"] = data
    found["holdsrun"] = data / "run"
    found["holdsrun"].mkdir()
    (found["holdsrun"] / "config.json").write_text("{}")
    return {name: str(path) for name, path in found.items()}


# Flags that replace or join a command that would run, and what the line must say: what came, and what to do.
CASES = [
    (["--student", "{nothing}"], ["--student", "nothing", "no such folder"]),
    (["--student", "{prompts}"], ["--student", "is a file", "give a Hugging Face model folder"]),
    (["--student", "{folder}"], ["--student", "no config.json"]),
    (["--student", "{damaged}"], ["--student", "logits are not finite", "give another copy"]),
    (["--teacher", "{nothing}"], ["--teacher", "no such folder"]),
    (["--teacher", "{other}"], ["different tokenizers", "one vocabulary"]),
    (["--prompt_format", "chat", "--student", "{nochat}"], ["no chat template", "--prompt_format raw"]),
    (["--prompts", "{nothing}"], ["nothing does not exist"]),
    (["--prompts", "{empty}"], ["empty.jsonl holds no records"]),
    (["--prompts", "{malformed}"], ["malformed.jsonl line 2 is not JSON"]),
    (["--prompts", "{nofield}"], ["record 1 has no field 'prompt'", "question"]),
    (["--prompts", "{blank}"], ["record 1", "give a text"]),
    (["--prompts", "{text}"], ["'.txt'", "give a .jsonl or .parquet file"]),
    (["--prompts", "{long}"], ["30 tokens", "--rollout.max_prompt_tokens 10"]),
    (["--prompts", "{long}", "--rollout.overlong_prompts", "drop"], ["all 1 prompts are over"]),
    (["--select.retention", "0"], ["--select.retention 0.0", "(0, 1]"]),
    (["--select.retention", "1.5"], ["--select.retention 1.5", "(0, 1]"]),
    (["--select.by", "soft_xor"], ["soft_xor", "did you mean 'soft_or'?"]),
    (["--select.by", "nowhere:Rule"], ["nowhere:Rule", "module:Name"]),
    (["--select.by", "entropy", "--select.options", "colour", "red"], ["takes no option 'colour'"]),
    (
        ["--select.by", "all", "--select.options", "sharpness", "2"],
        ["--select.options sharpness 2", "takes no options"],
    ),
    (["--out", "{holdsrun}"], ["holds a run already", "--resume"]),
    (["--out", "{folder}"], ["is not empty"]),
    (["--out", "{prompts}"], ["is a file"]),
    (["--eval.suite", "sums"], ["--eval.suite 'sums'", "NAME=FILE"]),
    (["--eval.suite", "sums={nothing}"], ["nothing does not exist"]),
    (["--eval.suite", "sums={unanswered}"], ["no field 'answer'", "gold answers"]),
    (["--eval.every", "5"], ["--eval.every 5 without --eval.suite"]),
    (["--eval.grader", "guess"], ["--eval.grader 'guess'", "math, suffix or module:function"]),
    (["--steps", "0"], ["--steps 0", "above 0"]),
    (["--steps", "many"], ["--steps many: give a whole number"]),
    (["--optim.lr", "fast"], ["--optim.lr fast: give a number"]),
    (["--loss.chunk_tokens", "few"], ["--loss.chunk_tokens few: give a whole number or auto"]),
    (["--select.options", "ranks"], ["--select.options ranks: give KEY VALUE pairs"]),
    (["--num_train_epochs", "3"], ["did you mean --steps (in optimiser steps, not epochs)?"]),
    (["--config", "{nothing}"], ["--config", "cannot be read", "No such file"]),
    (["--config", "{text}"], ["holds no settings by name"]),
    (["--step", "3"], ["unknown option --step", "did you mean --steps?"]),
    (["--select.by"], ["--select.by: give a value"]),
    (["--loss.divergence", "jsd", "--loss.beta", "1"], ["--loss.beta 1.0", "reverse_kl or forward_kl"]),
    (["--prompts", "{unanswered}", "--loss.reward_beta", "1"], ["--loss.reward_beta 1.0", "has no gold answer"]),
    (["--prompts", "{unanswered}", "--loss.prompt_weights", "paced"], ["prompt_weights paced", "has no gold answer"]),
    (["--rollout.horizon", "0.5", "--loss.reward_beta", "1"], ["--rollout.horizon 0.5", "--loss.reward_beta"]),
    (["--rollout.horizon_steps", "5"], ["--rollout.horizon_steps 5", "nothing grows"]),
    (["--loss.divergence", "kl"], ["--loss.divergence kl: give one of: reverse_kl"]),
    (["--optim.lr", "-1"], ["--optim.lr -1.0", "above 0"]),
    (["--optim.warmup_steps", "9"], ["--optim.warmup_steps 9", "--steps (2)"]),
    (["--rollout.top_p", "0"], ["--rollout.top_p 0.0", "(0, 1]"]),
    (["--engine.kind", "fsdp"], ["--engine.kind fsdp: give one of: torch"]),
    (["--engine.device", "cuda"], ["no CUDA device"]),
    (["--telemetry.options", "h_threshold", "high"], ["h_threshold"]),
]


def run(args, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["opsd", *args])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize(("flags", "said"), CASES, ids=[" ".join(flags) for flags, _ in CASES])
def test_bad_input_is_one_line_exit_2_and_writes_nothing(flags, said, folders, tmp_path, monkeypatch, capsys):
    values = {
        "--student": "{model}",
        "--teacher": "{model}",
        "--prompts": "{prompts}",
        "--out": str(tmp_path / "run"),
        "--steps": "2",
        "--prompt_format": "raw",
        "--rollout.max_prompt_tokens": "10",
        "--track.progress": "False",
    }
    own = dict.fromkeys(flags[::2]) if len(flags) > 1 else {}
    base = [word for flag, value in values.items() if flag not in own for word in (flag, value)]
    args = [word.format(**folders) if word.startswith("{") or "={" in word else word for word in [*base, *flags]]
    before = sorted(Path(folders["folder"]).rglob("*"))
    code, error = run(["train", *args], monkeypatch, capsys)
    assert code == 2
    assert error.startswith("opsd: ") and error.count("\n") == 1, error
    for part in said:
        assert part in error
    assert not (tmp_path / "run").exists() and sorted(Path(folders["folder"]).rglob("*")) == before


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            ["trian"],
            "unknown command 'trian'; give one of: train, eval, distance, inspect, plan, check-model, selectors, push",
        ),
        (["train"], "missing: --prompts, --out, --student"),
        (["train", "--resume"], "--resume: give a path"),
        (["train", "--resume", "RUN", "--optim.lr", "1"], "--resume RUN takes no --optim.lr"),
        (["check-model"], "missing: FOLDER"),
        (["push"], "missing: RUN, NAME;"),
        (["push", "runs/mine"], "missing: NAME;"),
        (["push", "--private", "True", "runs/mine"], "missing: NAME;"),
        (["push", "runs/mine", "owner/name", "more"], "unexpected argument more"),
        (["inspect", "--step", "last", "runs/mine"], "--step last: give a whole number"),
        (["train", "--resume", "RUN", "--steps", "9"], "no run there"),
        (["train", "--resume", "nowhere"], "no run there"),
        (["selectors", "soft_or"], "takes no arguments"),
    ],
)
def test_bad_commands_are_one_line_and_exit_2(args, said, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, error = run(args, monkeypatch, capsys)
    assert code == 2 and error.count("\n") == 1 and said in error


def test_selectors_are_listed_a_line_each(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["opsd", "selectors"])
    cli.main()
    listed = {line.split()[0]: line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()}
    paper = {"all", "entropy_sample", "entropy", "soft_or", "soft_or_bottom", "q3", "divergence", "random"}
    assert paper <= set(listed) and all(len(text) > 10 for text in listed.values())


def test_help_lists_every_flag(monkeypatch, capsys):
    from opsd.config import TrainConfig
    from opsd.config.cli import flags_of

    monkeypatch.setattr(sys, "argv", ["opsd", "train", "--help"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert [flag for flag in flags_of(TrainConfig) if flag not in shown] == []


@pytest.mark.e2e
def test_the_installed_command_stops_without_a_traceback(tmp_path):
    opsd = Path(sys.executable).with_name("opsd")
    done = subprocess.run([opsd, "train", "--resume", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


@pytest.mark.e2e
def test_code_of_the_user_that_calls_exit_ends_a_run_with_a_reason(folders, monkeypatch, capsys, tmp_path):
    """Exit code 0 of a rule would pass for a run that finished."""
    (tmp_path / "quits.py").write_text(
        "import sys\n"
        "from tip_patch.selectors import SoftOr\n"
        "class Rule(SoftOr):\n"
        "    def score(self, *args, **kwargs):\n"
        "        sys.exit(0)\n"
    )
    monkeypatch.chdir(tmp_path)
    words = ["train", "--student", folders["model"], "--teacher", folders["model"], "--prompts", folders["prompts"]]
    words += ["--prompt_format", "raw", "--out", "run", "--steps", "2", "--prompts_per_step", "1"]
    words += ["--rollout.max_prompt_tokens", "10", "--rollout.max_new_tokens", "4", "--rollout.samples_per_prompt", "1"]
    code, error = run([*words, "--select.by", "quits:Rule", "--select.retention", "0.5"], monkeypatch, capsys)
    assert code == 1
    assert error.splitlines()[-1] == (
        "opsd: code called by the run ended it with exit code 0; continue with --resume run"
    )
