"""Whole runs of tiny models under every kind of teacher: what it is asked, who it is, and how a run goes on."""

import json

import pytest
from tiny_models import tiny_pair

from opsd.config import from_json
from opsd.run import checkpoint
from opsd.train import resume, start
from opsd.utils.errors import UserError


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Settings of a pair of tiny models."""
    return tiny_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def settings(pair, tmp_path):
    """Settings of a four-step run in the folder of that name; overrides are given by dotted name with __."""

    def make(name, **overrides):
        values = pair | {
            "out": str(tmp_path / name),
            "steps": 4,
            "prompts_per_step": 3,
            "rollout": {"samples_per_prompt": 2, "max_prompt_tokens": 8, "max_new_tokens": 6},
            "optim": {"lr": 1e-2},
            "engine": {"device": "cpu", "micro_batch_tokens": 40},
            "eval": {"grader": "suffix"},
            "checkpoint": {"every": 2},
            "telemetry": {"every": 2, "save_rollouts_every": 1},
        }
        for name, value in overrides.items():
            part, _, key = name.partition("__")
            values[part] = {**values.get(part, {}), key: value} if key else value
        return from_json(values)

    return make


def metrics_of(config):
    """The lines of metrics.jsonl without what the clock and the machine decide."""
    with open(f"{config.out}/metrics.jsonl") as lines:
        found = [json.loads(line) for line in lines]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "mem/"))} for line in found]


def run(config):
    start(config)
    return metrics_of(config)


def rollouts_of(config, step):
    with open(f"{config.out}/rollouts/step_{step}.jsonl") as lines:
        return [json.loads(line) for line in lines]


def written(path, text):
    path.write_text(text)
    return str(path)


def stopped_then_resumed(config, monkeypatch):
    """The run's metrics, where it was killed with step 3 done and step 2 saved, and then went on."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        whole = checkpoint.save

        def save(folder, model, tokenizer, state, *rest):
            if state.step == 4:
                raise KeyboardInterrupt
            return whole(folder, model, tokenizer, state, *rest)

        patch.setattr(checkpoint, "save", save)
        start(config)
    resume(checkpoint.Path(config.out))
    return metrics_of(config)


def without(metrics, *names):
    return [{k: v for k, v in line.items() if k not in names} for line in metrics]


def test_a_context_equal_to_the_prompt_gives_todays_numbers_to_the_last_bit(settings, tmp_path):
    plain = run(settings("plain"))
    context = written(tmp_path / "context.txt", "{prompt}\n")
    same = run(settings("same", teacher__context=context))
    assert {line["teacher/context_frac"] for line in same} == {1.0}
    assert without(same, "teacher/context_frac") == plain


def test_a_context_that_shows_the_answer_changes_what_is_taught_and_is_recorded(settings, tmp_path, monkeypatch):
    plain = run(settings("plain"))
    context = written(tmp_path / "context.txt", "{answer};{prompt}")
    config = settings("shown", teacher__context=context)
    shown = run(config)
    assert shown[0]["loss/nats"] != plain[0]["loss/nats"] and shown[0]["rollout/tokens"] == plain[0]["rollout/tokens"]
    for record in rollouts_of(config, 1):
        assert record["teacher_prompt_ids"][-len(record["prompt_ids"]) :] == record["prompt_ids"]
        assert len(record["teacher_prompt_ids"]) > len(record["prompt_ids"])
    assert stopped_then_resumed(settings("broken", teacher__context=context), monkeypatch) == shown
    # Another text is another run.
    config = settings("changed", teacher__context=context)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("opsd.train.Trainer.evaluate_before", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        start(config)
    written(tmp_path / "context.txt", "{prompt};{answer};")
    with pytest.raises(UserError, match="gives other prompts than those that the run began with"):
        resume(checkpoint.Path(config.out))


def test_a_rewarded_sample_is_shown_where_there_is_one(settings, tmp_path, monkeypatch):
    context = written(tmp_path / "context.txt", "{rollout};{prompt}")
    monkeypatch.setattr(
        "opsd.eval.evaluator.Evaluator.rewards", lambda self, rollouts: [float(r.id % 4 == 1) for r in rollouts]
    )
    config = settings("shown", teacher__context=context, teacher__max_prompt_tokens=20)
    metrics = run(config)
    # Samples 1 and 5 of six are rewarded; they are shown to samples 0 and 4.
    assert [line["teacher/context_frac"] for line in metrics] == [2 / 6] * 4
    records = rollouts_of(config, 1)
    assert [record["id"] for record in records if "teacher_prompt_ids" in record] == [0, 4]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rollout__samples_per_prompt": 1}, "another sample of the same prompt: give --rollout.samples_per_prompt 2"),
        ({"answer_field": "nothing"}, r"has \{rollout\}: prompt 0 of .* has no answer to be rewarded for"),
        ({"teacher__max_prompt_tokens": 500}, r"a prompt of 500 tokens are over the 256 positions of --teacher"),
    ],
)
def test_a_context_that_cannot_be_shown_is_said_before_the_run(settings, tmp_path, options, said):
    context = written(tmp_path / "context.txt", "{rollout};{prompt}")
    with pytest.raises(UserError, match=said):
        start(settings("run", teacher__context=context, **options))
