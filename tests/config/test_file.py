"""Settings as a file: what --dump_config prints, --config reads; flags stand over it, and errors are those of flags."""

import json

import pytest
import yaml

from opsd.config import SelectConfig, TeacherConfig, TrainConfig, to_json
from opsd.config.cli import parse
from opsd.config.file import as_command, dumped, with_file
from opsd.utils.errors import UserError

SET = [
    *("--student", "s", "--teacher", "t", "--prompts", "p.jsonl", "--out", "run", "--optim.lr", "1e-5"),
    *("--select.by", "soft_or", "--select.options", "a", "b", "--eval.suite", "x=x.jsonl", "y=y.jsonl"),
    *("--lora.rank", "4", "--lora.target_modules", "q_proj", "v_proj", "--eval.limit", "None"),
]


def read(*args):
    return parse(TrainConfig, with_file(list(args)), "opsd train")


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_what_is_dumped_is_read_back(file):
    assert read("--config", file(dumped(SET))) == parse(TrainConfig, SET, "opsd train")


def test_a_runs_own_config_json_is_such_a_file(file):
    config = parse(TrainConfig, SET, "opsd train")
    beside = {"began": {"digests": {}, "time": None}, "extended": [3]}
    assert read("--config", file(json.dumps(to_json(config) | beside))) == config


def test_flags_stand_over_the_file_wherever_they_are(file):
    path = file("student: s\nteacher: {model: t}\nprompts: p\nout: a\nsteps: 3\noptim:\n  lr: 1e-5\n  kind: sgd\n")
    config = read("--steps", "7", "--config", path, "--optim.lr=2e-5", "--out", "b")
    assert (config.steps, config.optim.lr, config.optim.kind, config.out) == (7, 2e-5, "sgd", "b")


def test_a_file_may_leave_out_what_flags_give(file):
    config = read("--config", file("eval:\n  every: 5\n"), *SET)  # the suite is a flag
    assert config.eval.every == 5 and config.teacher == TeacherConfig("t")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optim:\n  learning_rate: 1\n", r"unknown option --optim.learning_rate: did you mean --optim.lr\?"),
        ("steps: many\n", "--steps many: give a whole number"),
        ("steps: 0\n", "--steps 0: give a number above 0"),
        ("rollout:\n  sleep: 3\n", "--rollout.sleep 3: give True or False"),
        ("- steps\n", "holds no settings by name"),
        ("steps: [\n", "cannot be read"),
        ("!!python/object/apply:os.system ['touch ran']\n", "cannot be read"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_as_of_flags(file, text, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"^[^\n]*{said}[^\n]*$"):
        read("--config", file(text), *SET)
    assert not (tmp_path / "ran").exists()


def test_without_arguments_every_setting_is_dumped_with_its_default():
    values = yaml.safe_load(dumped([]))
    unset = TrainConfig(student="", teacher=TeacherConfig(model=""), prompts="", out="")
    assert values == json.loads(json.dumps(to_json(unset)))


def test_a_command_names_what_differs_from_the_defaults_and_makes_the_same_run():
    import shlex

    config = TrainConfig("p q.jsonl", "run", 3, student="s", teacher=TeacherConfig("t"), select=SelectConfig(by="q3"))
    words = shlex.split(as_command(config))
    assert words[:2] == ["opsd", "train"] and "--optim.lr" not in words
    assert parse(TrainConfig, words[2:], "opsd train") == config
