"""Every setting of a run, in frozen dataclasses. The command line is made from these; so is config.json."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from opsd.config.checks import check
from opsd.config.schema import (
    CheckpointConfig,
    EngineConfig,
    EnvironmentConfig,
    EvalConfig,
    LoraConfig,
    LossConfig,
    OptimConfig,
    RolloutConfig,
    SelectConfig,
    TeacherConfig,
    TelemetryConfig,
    TrackConfig,
)
from opsd.utils.errors import UserError

__all__ = [
    "CheckpointConfig",
    "EngineConfig",
    "EnvironmentConfig",
    "EvalConfig",
    "LoraConfig",
    "LossConfig",
    "OptimConfig",
    "RolloutConfig",
    "SelectConfig",
    "TeacherConfig",
    "TelemetryConfig",
    "TrackConfig",
    "TrainConfig",
    "from_json",
    "to_json",
]


@dataclass(frozen=True)
class TrainConfig:
    """On-policy distillation of one student from one teacher."""

    student: str
    """Folder (or hub name) of the student to start from."""
    teacher: TeacherConfig
    prompts: str
    """Training prompts: .jsonl or .parquet."""
    out: str
    """Run folder; must be new or empty."""
    steps: int = 100
    """Optimiser steps."""
    prompts_per_step: int = 8
    """Prompts per optimiser step."""
    seed: int = 0
    """Decides prompt order, sampling and random selection; the same seed gives the same run."""
    prompt_format: Literal["chat", "raw"] = "chat"
    """chat applies the tokenizer's template; raw encodes the prompt as it stands."""
    thinking: Literal["on", "off"] = "off"
    """Thinking mode of the chat template, the same for student and teacher."""
    trust_remote_code: bool = False
    """Run the code that a model folder brings along (auto_map), of student and teacher; else such a folder is refused.
    """
    prompt_field: str = "prompt"
    """Column that holds the prompt (a string or a list of chat messages)."""
    answer_field: str = "answer"
    """Column that holds the gold answer, where there is one."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    track: TrackConfig = field(default_factory=TrackConfig)

    def __post_init__(self) -> None:
        check(self)


def to_json(config: TrainConfig) -> dict[str, Any]:
    """The resolved configuration as plain JSON values."""
    return dataclasses.asdict(config)


def from_json(values: dict[str, Any]) -> TrainConfig:
    """The inverse of `to_json`. Raises UserError for a key that this version does not know."""
    parts = {
        "teacher": TeacherConfig,
        "rollout": RolloutConfig,
        "select": SelectConfig,
        "loss": LossConfig,
        "optim": OptimConfig,
        "lora": LoraConfig,
        "engine": EngineConfig,
        "eval": EvalConfig,
        "environment": EnvironmentConfig,
        "checkpoint": CheckpointConfig,
        "telemetry": TelemetryConfig,
        "track": TrackConfig,
    }
    try:
        built = {
            key: parts[key](**{k: tuple(v) if isinstance(v, list) else v for k, v in value.items()})
            if key in parts
            else value
            for key, value in values.items()
        }
        _check_choices(built, TrainConfig)
        return TrainConfig(**built)
    except (TypeError, AttributeError) as error:
        raise UserError(f"config.json does not fit this version of opsd ({error}); start a new run") from error


def _check_choices(built: dict[str, Any], kind: type, name: str = "") -> None:
    """Raises UserError for a value that is none of its field's choices: config.json can be edited, unlike flags."""
    for key, hint in typing.get_type_hints(kind).items():
        value = built.get(key, ...)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            _check_choices(vars(value), type(value), f"{name}{key}.")
        elif typing.get_origin(hint) is Literal and value is not ... and value not in typing.get_args(hint):
            choices = ", ".join(map(str, typing.get_args(hint)))
            raise UserError(f"config.json: {name}{key} is {value!r}; give one of: {choices}")
