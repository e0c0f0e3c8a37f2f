"""Every setting of a run, in frozen dataclasses. The command line is made from these; so is config.json."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from opsd.config.schema import (
    CheckpointConfig,
    EngineConfig,
    EnvironmentConfig,
    EvalConfig,
    LoraConfig,
    LossConfig,
    OptimConfig,
    PromptSettings,
    RolloutConfig,
    SelectConfig,
    StepSettings,
    TeacherConfig,
    TelemetryConfig,
    TrackConfig,
)
from opsd.config.settings import fields_of, is_part
from opsd.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TrainConfig(PromptSettings, StepSettings):
    """On-policy distillation of one student from one teacher."""

    student: str
    """Folder (or hub name) of the student to start from."""
    teacher: TeacherConfig
    trust_remote_code: bool = False
    """Run the code that a model folder brings along (auto_map), of student and teacher; else such a folder is refused.
    """
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
        """Each part has checked itself; here parts are checked against each other. Raises UserError."""
        super().__post_init__()
        if self.optim.warmup_steps > self.steps:
            raise UserError(f"--optim.warmup_steps {self.optim.warmup_steps}: give 0 to --steps ({self.steps})")
        sharded, served = self.engine.kind == "deepspeed", self.teacher.kind == "vllm"
        if self.teacher.shard and (served or not sharded):
            raise UserError("--teacher.shard True needs --teacher.kind local and --engine.kind deepspeed")
        if (served or self.teacher.shard) and self.eval.suite and self.eval.teacher:
            raise UserError(
                "a teacher that is served or sharded gives no answers of its own: give --eval.teacher False"
            )
        wait_s = self.rollout.timeout_s
        if self.rollout.engine == "vllm_process" and sharded and wait_s >= self.engine.wait_s:
            raise UserError(
                f"--rollout.timeout_s {wait_s:g} is not below --engine.wait_s {self.engine.wait_s:g}: the other ranks "
                "would give up first; make one smaller or the other larger"
            )


def to_json(config: TrainConfig) -> dict[str, Any]:
    """The resolved configuration as plain JSON values."""
    return dataclasses.asdict(config)


def from_json(values: dict[str, Any]) -> TrainConfig:
    """The inverse of `to_json`. Raises UserError for a key that this version does not know, or a value that is none."""
    try:
        return _made(TrainConfig, values)
    except UserError as error:
        raise UserError(f"config.json: {error}") from error
    except (TypeError, AttributeError) as error:
        raise UserError(f"config.json does not fit this version of opsd ({error}); start a new run") from error


def _made(kind: Any, value: Any) -> Any:
    """A value of a type, from what JSON makes of it."""
    if is_part(kind):
        kinds = fields_of(kind)
        return kind(**{name: _made(kinds.get(name), own) for name, own in value.items()})
    return tuple(value) if isinstance(value, list) else value
