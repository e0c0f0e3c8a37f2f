"""A finished run that is given a later end: what it then is, what is said, what is refused."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from opsd.config import OptimConfig, from_json
from opsd.config.saved import check_resumable
from opsd.engine import learning_rate
from opsd.run import checkpoint
from opsd.run.folder import RunFolder
from opsd.train import extension, resume, start
from opsd.utils.errors import RunStopped, UserError


@pytest.fixture(scope="module")
def settings(make_folder, make_model, tmp_path_factory):
    """Settings of a run of so many steps; its learning rate is constant unless overridden."""
    data = tmp_path_factory.mktemp("data") / "sums.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{a}+1=", "answer": str(a + 1)}) + "\n" for a in range(4)))
    student, teacher = make_folder(make_model(seed=0)), make_folder(make_model(seed=1))

    def make(out, steps, **parts):
        values = {
            "student": str(student),
            "teacher": {"model": str(teacher)},
            "prompts": str(data),
            "out": str(out),
            "steps": steps,
            "prompts_per_step": 2,
            "prompt_format": "raw",
            "rollout": {"samples_per_prompt": 2, "max_prompt_tokens": 8, "max_new_tokens": 4},
            "optim": {"lr": 1e-2, "schedule": "constant"},
            "engine": {"device": "cpu"},
            "telemetry": {"every": 0},
            "track": {"progress": False},
        }
        return from_json(values | parts)

    return make


def weights(run, step):
    return AutoModelForCausalLM.from_pretrained(run / "checkpoints" / f"step_{step}").state_dict()


@pytest.mark.e2e
def test_under_a_constant_rate_an_extended_run_is_the_run_that_had_begun_so(settings, tmp_path, capsys):
    for name, steps in (("short", 2), ("long", 4)):
        start(settings(tmp_path / name, steps))
    with pytest.raises(UserError, match=r"has finished after 2 steps; give --steps N to extend it"):
        resume(tmp_path / "short")
    resume(tmp_path / "short", 4)
    assert "extended from 2 to 4 steps; the learning rate is constant" in capsys.readouterr().err
    ours, theirs = (weights(tmp_path / name, 4) for name in ("short", "long"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    saved = json.loads((tmp_path / "short" / "config.json").read_text())
    assert (saved["steps"], saved["extended"]) == (4, [2]) and (tmp_path / "short" / "DONE").exists()
    assert RunFolder.open(tmp_path / "short").extended == [2]
    assert checkpoint.newest(tmp_path / "short" / "checkpoints")[0].name == "step_4"


def test_a_cosine_stretches_and_the_line_says_from_what_to_what(settings, tmp_path):
    old = dataclasses.replace(settings(tmp_path, 100), optim=OptimConfig(lr=1e-3))
    new = dataclasses.replace(old, steps=400)
    line = extension(old, new, 100)
    # Half a cosine over 400 steps, a quarter of it done: 1e-3·(1 + cos(π/4))/2 = 8.54e-4; over 100 steps it is at 0.
    assert "the learning rate of step 101 is 8.54e-04 instead of 0.00e+00" in line and "\n" not in line
    assert learning_rate(101, 400, new.optim) == pytest.approx(8.5355e-4, rel=1e-4)


def test_an_end_that_is_no_later_is_refused(settings, tmp_path):
    RunFolder.create(settings(tmp_path / "run", 3))
    for steps in (2, 3):
        with pytest.raises(UserError, match=rf"^--steps {steps}: the run [^\n]+ has 3 steps; give more"):
            check_resumable(tmp_path / "run", steps)
    assert check_resumable(tmp_path / "run").steps == 3


def test_what_the_compute_type_was_stands_in_the_runs_configuration(settings, tmp_path):
    assert settings(tmp_path, 1).engine.dtype == "auto"
    start(settings(tmp_path / "run", 1))
    assert RunFolder.open(tmp_path / "run").config.engine.dtype == "float32"


class Fails:
    """A rule of the user's own that fails."""

    needs, needs_kept, normalise_over, fixed_budget = frozenset({"entropy_N"}), frozenset(), "micro_batch", True

    def __init__(self, retention=0.5):
        pass

    def budget(self, tokens):
        return tokens

    def prepare(self, all_stats):
        pass

    def __call__(self, stats, seed=0):
        return {}["gone"]

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_a_rule_that_fails_is_named_with_its_step_and_its_line(settings, tmp_path):
    config = settings(tmp_path / "run", 1, select={"by": f"{__name__}:Fails"})
    said = r"^step 1: selector Fails failed \(KeyError: 'gone'; \S+test_extend.py line \d+\)"
    with pytest.raises(RunStopped, match=said):
        start(config)
