"""Settings: what is written is what is read, and every check says in one line what was given and what to give."""

import dataclasses
import json
import typing

import pytest

from opsd.config import (
    CheckpointConfig,
    EngineConfig,
    EvalConfig,
    LoraConfig,
    LossConfig,
    OptimConfig,
    RolloutConfig,
    SelectConfig,
    TeacherConfig,
    TelemetryConfig,
    TrackConfig,
    TrainConfig,
    from_json,
    to_json,
)
from opsd.utils.errors import UserError


def config_of(**changes) -> TrainConfig:
    settings = {"student": "s", "teacher": TeacherConfig(model="t"), "prompts": "p.jsonl", "out": "run", **changes}
    return TrainConfig(**settings)


EVERYTHING_SET = config_of(
    steps=7,
    thinking="on",
    rollout=RolloutConfig(temperature=0.7, top_k=20, overlong_prompts="drop"),
    select=SelectConfig(by="soft_or", retention=0.1, normalise_over="batch", options={"sharpness": "2", "x": "y"}),
    loss=LossConfig(divergence="jsd", beta=0.1, chunk_tokens=512),
    optim=OptimConfig(lr=1e-5 / 3, warmup_steps=7, schedule="constant"),
    lora=LoraConfig(rank=4, alpha=0.5, use_rslora=True, target_modules=("q_proj", "v_proj")),
    engine=EngineConfig(dtype="bfloat16", device="cpu"),
    eval=EvalConfig(every=3, suite=("a=a.jsonl", "b=b.jsonl"), max_new_tokens=9, limit=4),
    checkpoint=CheckpointConfig(every=0, keep=1),
    telemetry=TelemetryConfig(every=0, save_tokens=False, options={"h_threshold": "0.5"}),
    track=TrackConfig(wandb="offline", progress=False),
)


@pytest.mark.parametrize("config", [config_of(), EVERYTHING_SET], ids=["defaults", "everything set"])
def test_a_configuration_survives_its_json(config):
    assert from_json(json.loads(json.dumps(to_json(config)))) == config


def test_every_part_of_the_configuration_is_read_back_as_such():
    # a part that from_json forgets would come back as a plain dict
    kinds = typing.get_type_hints(TrainConfig)
    read = from_json(json.loads(json.dumps(to_json(config_of()))))
    for name, kind in kinds.items():
        if dataclasses.is_dataclass(kind):
            assert isinstance(getattr(read, name), kind), name


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda values: values.update(colour=1.0), "colour is not a setting of this version of opsd"),
        (lambda values: values["optim"].update(rate=1.0), "optim.rate is not a setting of this version of opsd"),
        (lambda values: values.pop("student"), "student is missing"),
        (lambda values: values["teacher"].update(path="m"), "teacher.path is not a setting of this version of opsd"),
        (lambda values: values.update(optim=3), "optim is 3, not a group of settings"),
        (lambda values: values.update(steps="two"), "steps is 'two'; put back"),
        (lambda values: values.update(steps=True), "steps is True; put back"),
        (lambda values: values["rollout"].update(sleep=None), "rollout.sleep is None; put back"),
        (lambda values: values["lora"].update(target_modules=[3]), r"lora.target_modules is \[3\]; put back"),
    ],
)
def test_a_damaged_configuration_is_refused_with_the_setting_and_what_it_is(damage, said):
    values = to_json(config_of())
    damage(values)
    with pytest.raises(UserError, match=rf"^config.json: {said}[^\n]*$"):
        from_json(values)


def test_but_for_sizes_the_papers_settings_are_the_defaults():
    # Table 9: temperature 1, lr 1e-6, cosine, reverse KL
    config = config_of()
    assert config.rollout.temperature == 1
    assert (config.optim.lr, config.optim.schedule, config.loss.divergence) == (1e-6, "cosine", "reverse_kl")


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("steps", 0),
        ("steps", -1),
        ("prompts_per_step", 0),
        ("rollout.samples_per_prompt", 0),
        ("rollout.max_prompt_tokens", 0),
        ("rollout.max_new_tokens", 0),
        ("rollout.generate_batch", -3),
        ("rollout.temperature", -0.1),
        ("rollout.temperature", NAN),
        ("rollout.temperature", INF),
        ("rollout.top_p", 0.0),
        ("rollout.top_p", 1.1),
        ("rollout.top_p", NAN),
        ("rollout.top_k", -1),
        ("select.retention", 0.0),
        ("select.retention", 1.1),
        ("select.retention", -0.5),
        ("select.retention", NAN),
        ("select.clip_quantile", 0.0),
        ("select.clip_quantile", 1.5),
        ("select.clip_quantile", NAN),
        ("loss.temperature", 0.0),
        ("loss.temperature", NAN),
        ("loss.temperature", INF),
        ("loss.chunk_tokens", 0),
        ("loss.chunk_tokens", -5),
        ("optim.lr", 0.0),
        ("optim.lr", -1e-6),
        ("optim.lr", NAN),
        ("optim.lr", INF),
        ("optim.warmup_steps", -1),
        ("optim.warmup_steps", 101),
        ("optim.weight_decay", -0.1),
        ("optim.weight_decay", NAN),
        ("optim.max_grad_norm", -1.0),
        ("optim.max_grad_norm", NAN),
        ("optim.min_lr_fraction", -0.1),
        ("optim.min_lr_fraction", 1.1),
        ("optim.beta1", 1.0),
        ("optim.beta2", -0.1),
        ("optim.eps", -1e-8),
        ("lora.rank", -1),
        ("lora.alpha", 0.0),
        ("lora.alpha", NAN),
        ("lora.dropout", 0.1),
        ("engine.micro_batch_tokens", 0),
        ("eval.every", -1),
        ("eval.every", 5),  # without a suite
        ("eval.samples", 0),
        ("eval.generate_batch", 0),
        ("eval.temperature", -1.0),
        ("eval.top_p", 0.0),
        ("eval.top_k", -1),
        ("eval.limit", 0),
        ("eval.max_new_tokens", 0),
        ("checkpoint.every", -1),
        ("checkpoint.keep", 0),
        ("telemetry.every", -1),
        ("telemetry.save_rollouts_every", -1),
    ],
)
def test_a_value_out_of_range_is_named_with_its_flag(flag, value):
    part, _, name = flag.rpartition(".")
    whole = config_of()
    with pytest.raises(UserError, match=rf"^--{flag} {value}\b[^\n]+$"):
        if part:
            # Each part checks itself; against other parts it is checked when the whole is made.
            dataclasses.replace(whole, **{part: dataclasses.replace(getattr(whole, part), **{name: value})})
        else:
            dataclasses.replace(whole, **{name: value})


def test_each_part_knows_the_flags_that_it_is_set_by():
    for name, kind in typing.get_type_hints(TrainConfig).items():
        if dataclasses.is_dataclass(kind):
            assert kind.part == f"{name}.", name


@pytest.mark.parametrize(
    ("lora", "line"),
    [
        ({"alpha": 16.0}, r"--lora.\* is set but --lora.rank is 0[^\n]+"),
        ({"target_modules": ("q_proj",)}, r"--lora.\* is set but --lora.rank is 0[^\n]+"),
        ({"rank": 2, "target_modules": ()}, r"--lora.target_modules : give [^\n]+"),
        ({"rank": 2, "target_modules": ("all-linear", "x")}, r"--lora.target_modules all-linear x: give [^\n]+"),
    ],
)
def test_adapters_that_would_not_be_trained_as_asked_are_refused_in_one_line(lora, line):
    with pytest.raises(UserError, match=f"^{line}$"):
        LoraConfig(**lora)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.5, NAN])
def test_the_mixture_of_jsd_lies_between_its_ends(beta):
    with pytest.raises(UserError, match=rf"^--loss.beta {beta}: [^\n]+reverse_kl or forward_kl$"):
        LossConfig(divergence="jsd", beta=beta)
    LossConfig(divergence="reverse_kl", beta=beta)  # it is not read then


@pytest.mark.parametrize(
    "changes",
    [
        {"select": SelectConfig(retention=1.0, clip_quantile=1.0)},
        {"rollout": RolloutConfig(temperature=0.0, top_p=1.0, top_k=0)},
        {"optim": OptimConfig(warmup_steps=100, max_grad_norm=0.0, min_lr_fraction=1.0)},
        {"checkpoint": CheckpointConfig(every=0)},
        {"telemetry": TelemetryConfig(every=0, save_rollouts_every=0)},
        {"eval": EvalConfig(every=0)},
    ],
)
def test_the_ends_of_the_ranges_are_allowed(changes):
    config_of(**changes)


def test_settings_cannot_be_changed_after_they_were_checked():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config_of().steps = 0
