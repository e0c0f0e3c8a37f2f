"""Whole runs of tiny models under every kind of teacher: what it is asked, who it is, and how a run goes on."""

import json
import shutil

import pytest
import torch
from killed import killed_at_step_3
from safetensors.torch import load_file
from tiny_models import build_model, plain_tokenizer, tiny_pair
from tolerance import close, transformer

from bench.updates import trainer_of
from opsd.config import EngineConfig, OptimConfig, from_json
from opsd.config.paths import check_paths
from opsd.data.packing import pack
from opsd.engine import TorchEngine
from opsd.model.scorer import Scorer
from opsd.run import checkpoint
from opsd.run.began import Began
from opsd.teacher import LocalTeacher, RoutedTeacher
from opsd.train import resume, start
from opsd.types import Prompt, Rollout
from opsd.utils.errors import UserError

CPU = torch.device("cpu")
DOMAINS = ("low", "high")


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
    resume(killed_at_step_3(monkeypatch, config))
    return metrics_of(config)


def without(metrics, *names):
    return [{k: v for k, v in line.items() if k not in names} for line in metrics]


def test_a_context_equal_to_the_prompt_gives_todays_numbers_to_the_last_bit(settings, tmp_path):
    plain = run(settings("plain"))
    context = written(tmp_path / "context.txt", "{prompt}\n")
    same = run(settings("same", teacher__context=context))
    assert {line["teacher/context_frac"] for line in same} == {1.0}
    assert without(same, "teacher/context_frac") == plain


@pytest.mark.e2e
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
    with pytest.raises(
        UserError, match=r"\.jsonl or [^ ]+context\.txt gives other prompts than those that the run started with"
    ):
        resume(checkpoint.Path(config.out))


@pytest.mark.parametrize(("flag", "file"), [("student", "model.safetensors"), ("teacher", "config.json")])
def test_a_run_does_not_go_on_with_another_model_in_the_same_folder(settings, pair, tmp_path, monkeypatch, flag, file):
    path, place = {"student": ("student", pair["student"]), "teacher": ("teacher__model", pair["teacher"]["model"])}[
        flag
    ]
    folder = shutil.copytree(place, tmp_path / flag)
    config = settings("run", lora={"rank": 2}, **{path: str(folder)})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("opsd.train.Trainer.evaluate_before", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        start(config)
    changed = bytearray((folder / file).read_bytes())
    changed[-1] ^= 1 if file == "model.safetensors" else ord("\n") ^ ord(" ")
    (folder / file).write_bytes(changed)
    run = checkpoint.Path(config.out)
    with pytest.raises(UserError, match=f"--resume {run}: the model of --{flag} is not the one that the run started"):
        resume(run)
    # A folder of an earlier version does not say it.
    values = json.loads((run / "config.json").read_text())
    del values["began"]["models"]
    assert Began.from_json(values["began"]).models == {}


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
        ({"answer_field": "nothing"}, r"has \{rollout\}: prompt 0 of .* has no gold answer"),
        (
            {"teacher__max_prompt_tokens": 500},
            "of 500 tokens exceed the 256 positions of --teacher .*give a smaller --teacher.max_prompt_tokens",
        ),
    ],
)
def test_a_context_that_cannot_be_shown_is_said_before_the_run(settings, tmp_path, options, said):
    context = written(tmp_path / "context.txt", "{rollout};{prompt}")
    with pytest.raises(UserError, match=said):
        start(settings("run", teacher__context=context, **options))


def teacher_of(config, step):
    """What a checkpoint holds of the teacher."""
    return load_file(f"{config.out}/checkpoints/step_{step}/trainer/teacher.safetensors")


def test_a_student_that_reads_what_it_wrote_behind_teaches_itself_nothing(settings):
    metrics = run(settings("run", teacher={"model": "self", "weights": "current"}))
    assert [(line["loss/nats"], line["optim/grad_norm"]) for line in metrics] == [(0.0, 0.0)] * 4


def test_the_average_is_that_of_float64_at_every_refresh(settings, pair, tmp_path):
    context = written(tmp_path / "context.txt", "{answer};{prompt}")
    own = {"model": "self", "weights": "ema", "ema": 0.75, "every": 2, "context": context}
    config = settings("run", teacher=own, checkpoint={"every": 1, "keep": 4})
    run(config)
    weights = [load_file(f"{pair['student']}/model.safetensors")]
    weights += [load_file(f"{config.out}/checkpoints/step_{step}/model.safetensors") for step in (1, 2, 3, 4)]
    average = {name: tensor.double() for name, tensor in weights[0].items()}
    for step in (1, 2, 3, 4):
        if step % 2 == 0:
            average = {name: 0.75 * value + 0.25 * weights[step][name].double() for name, value in average.items()}
        held = teacher_of(config, step)
        assert held.keys() == average.keys() and {tensor.dtype for tensor in held.values()} == {torch.float32}
        for name, value in average.items():
            # Two roundings of a number at each refresh.
            assert (held[name].double() - value).abs().max() <= 4 * 2.0**-24 * value.abs().max(), name
    assert any(not torch.equal(weights[1][name], weights[0][name]) for name in average)


@pytest.mark.e2e
@pytest.mark.parametrize("weights", ["ema", "current"])
def test_a_teacher_that_follows_the_student_goes_on_with_the_same_bits(settings, tmp_path, monkeypatch, weights):
    context = written(tmp_path / "context.txt", "{answer};{prompt}")
    own = {"model": "self", "weights": weights, "every": 3, "context": context}
    whole, broken = settings("whole", teacher=own), settings("broken", teacher=own)
    metrics = run(whole)
    assert stopped_then_resumed(broken, monkeypatch) == metrics
    ours, theirs = teacher_of(broken, 4), teacher_of(whole, 4)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # A checkpoint whose teacher is gone does not continue with another one.
    shutil.copytree(whole.out, tmp_path / "lost")
    (tmp_path / "lost" / "DONE").unlink()
    for step in (2, 4):
        (tmp_path / "lost" / "checkpoints" / f"step_{step}" / "trainer" / "teacher.safetensors").unlink()
    with pytest.raises(UserError, match="no intact checkpoint is left"):
        resume(tmp_path / "lost")


@pytest.mark.e2e
def test_weights_that_are_refreshed_after_the_last_step_only_are_the_initial_ones(settings, pair, tmp_path):
    context = written(tmp_path / "context.txt", "{answer};{prompt}")
    named = run(settings("named", teacher={"model": pair["student"], "context": context}))
    initial = run(settings("initial", teacher={"model": "self", "context": context}))
    late = {"model": "self", "weights": "current", "every": 100, "context": context}
    assert named == initial == run(settings("late", teacher=late))
    soon = run(settings("soon", teacher={**late, "every": 2}))
    assert soon[:2] == initial[:2] and soon[2]["loss/nats"] != initial[2]["loss/nats"]


@pytest.mark.e2e
def test_under_adapters_the_initial_teacher_is_the_base_without_them_and_nothing_is_held(settings, pair, tmp_path):
    context = written(tmp_path / "context.txt", "{answer};{prompt}")
    lora, own = {"rank": 4}, {"model": "self", "context": context}
    metrics = run(settings("off", teacher=own, lora=lora))
    assert metrics == run(settings("named", teacher={**own, "model": pair["student"]}, lora=lora))
    assert not (tmp_path / "off" / "checkpoints" / "step_4" / "trainer" / "teacher.safetensors").exists()
    averaged = settings("ema", teacher={**own, "weights": "ema"}, lora=lora)
    assert run(averaged)[:1] == metrics[:1]
    assert all(".lora_" in name for name in teacher_of(averaged, 4))


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ({"model": "m", "weights": "ema"}, "--teacher.weights ema needs --teacher self, not m"),
        ({"model": "self", "every": 5}, "--teacher.every 5 needs --teacher self with --teacher.weights ema or current"),
        ({"model": "self", "ema": 0.5}, "--teacher.ema 0.5 needs --teacher self with --teacher.weights ema"),
        ({"model": "self", "weights": "current", "shard": True}, "leave out --teacher.kind, --teacher.shard"),
        ({"model": "self", "weights": "ema", "ema": 1.0}, "--teacher.ema 1.0: give a fraction in"),
    ],
)
def test_what_a_self_teacher_cannot_be_is_one_line(settings, teacher, said):
    with pytest.raises(UserError, match=said):
        settings("run", teacher=teacher)


@pytest.mark.e2e
def test_forward_then_reverse_is_the_one_and_then_the_other(settings, monkeypatch):
    both = {"divergence": "forward_then_reverse", "warmup_steps": 2}
    forward, reverse, turned = (
        settings(name, loss=loss)
        for name, loss in (("forward", {"divergence": "forward_kl"}), ("reverse", {}), ("turned", both))
    )
    found = run(turned)
    assert found[:2] == run(forward)[:2] and found[0]["loss/nats"] != run(reverse)[0]["loss/nats"]
    # From step 3 the loss is the reverse KL over all tokens, of which telemetry knows at step 4.
    assert found[3]["loss/nats"] == pytest.approx(found[3]["student/reverse_kl_nats"], rel=1e-5)
    assert found[1]["loss/nats"] != pytest.approx(found[1]["student/reverse_kl_nats"], rel=1e-2)
    assert stopped_then_resumed(settings("broken", loss=both), monkeypatch) == found


@pytest.mark.parametrize("loss", [{"divergence": "forward_then_reverse"}, {"warmup_steps": 3}])
def test_warm_up_steps_and_forward_then_reverse_need_each_other(settings, loss):
    with pytest.raises(UserError, match="forward_then_reverse needs steps above 0, other divergences have none"):
        settings("run", loss=loss)


@pytest.fixture(scope="module")
def domains(pair, tmp_path_factory):
    """Settings of the same sums under two teachers of different widths, by their first digit."""
    folder = tmp_path_factory.mktemp("domains")
    with open(pair["prompts"]) as lines:
        records = [json.loads(line) for line in lines]
    records = [{**record, "domain": "low" if record["prompt"][0] in "01" else "high"} for record in records]
    (folder / "sums.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, width in (("low", 16), ("high", 24)):
        build_model(hidden_size=width, seed=width).save_pretrained(folder / name)
        plain_tokenizer().save_pretrained(folder / name)
    teachers = [f"{name}={folder / name}" for name in ("low", "high")]
    return {"teachers": teachers, "teacher": {"offload": True}, "prompts": str(folder / "sums.jsonl")}


@pytest.mark.numeric
def test_two_teachers_routed_are_two_runs_losses():
    # Rollouts 0, 2, 4 are scored by one teacher, 1 and 3 by a wider one.
    def rollouts(numbers, names):
        return [
            Rollout(n, Prompt(str(n), "", [6 + n, 7], None, teacher=names[n % 2]), [8 + n, 9, 10][: 1 + n % 3], False)
            for n in numbers
        ]

    teachers = {
        name: LocalTeacher(Scorer(build_model(hidden_size=w, seed=w)), CPU) for name, w in (("a", 16), ("b", 24))
    }

    def update(teacher, written):
        engine = TorchEngine(Scorer(build_model(seed=0)), EngineConfig(), OptimConfig(), CPU)
        batches = pack(written, 8)
        return trainer_of(engine, teacher).update(batches, teacher.hidden(batches), 1)

    both = update(RoutedTeacher(teachers), rollouts(range(5), ("a", "b")))
    alone = {
        name: update(teachers[name], rollouts(range(first, 5, 2), ("", ""))) for name, first in (("a", 0), ("b", 1))
    }
    assert both.teachers.keys() == alone.keys() and both.kept == sum(one.kept for one in alone.values())
    for name, one in alone.items():
        assert both.teachers[name][1] == one.kept
        close(both.teachers[name][0], one.loss_nats, *transformer(2, 24))
    total = sum(one.loss_nats * one.kept for one in alone.values()) / both.kept
    close(both.loss_nats, total, *transformer(2, 24))


def test_a_run_under_two_teachers_logs_each_and_goes_on_with_the_same_bits(settings, domains, monkeypatch):
    metrics = run(settings("whole", **domains))
    for line in metrics:
        of = {name: (line.get(f"teacher/{name}/loss_nats", 0), line.get(f"teacher/{name}/kept", 0)) for name in DOMAINS}
        kept = sum(kept for _, kept in of.values())
        assert kept == line["rollout/tokens"]
        # Three fp32 means, each rounded once per summed token.
        summed = sum(nats * kept for nats, kept in of.values())
        assert summed / kept == pytest.approx(line["loss/nats"], rel=3 * kept * 2**-24)
    assert any(f"teacher/{name}/kept" in line for line in metrics for name in ("low",))
    assert stopped_then_resumed(settings("broken", **domains), monkeypatch) == metrics


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"teachers": ["math"]}, "--teachers math: give NAME=FOLDER"),
        ({"teachers": ["a=x", "a=y"]}, "names a teacher twice"),
        (
            {"teachers": ["a=x", "b=y"], "teacher": {"kind": "vllm", "urls": ["a=http://u"]}},
            "--teacher.urls has no server of teacher b; add b=URL",
        ),
        ({"teacher": {"model": "m"}}, "--teacher m with --teachers"),
        ({"teacher": {"context": "c"}}, "--teacher.context works with one teacher only"),
        ({"teacher": {"kind": "vllm"}}, "--teacher.urls has no server of teacher low; add low=URL"),
        ({"teacher_field": "subject"}, "record 1 has no field 'subject'"),
        ({"teacher_field": "prompt"}, "'prompt' is '0.0='; --teachers has low, high"),
    ],
)
def test_what_several_teachers_cannot_be_is_one_line(settings, domains, options, said):
    with pytest.raises(UserError, match=said):
        start(settings("run", **(domains | options)))


def test_no_teacher_is_said(settings):
    with pytest.raises(UserError, match="--teacher is empty: give a model folder, self, or several"):
        check_paths(settings("run", teacher={}))
