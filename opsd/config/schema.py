"""Every setting of a run, in frozen dataclasses. The command line and config.json are made from these.

Units are in names or docstrings: tokens, steps, nats, seconds. Defaults are the paper's (Table 9) except for sizes:
these let a pair of half a billion parameters train on a laptop; recipes/ state the paper's.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from opsd.config.across import check_parts
from opsd.config.rollout import RolloutConfig
from opsd.config.settings import (
    EvaluationSettings,
    NonNegativeInt,
    PositiveInt,
    PromptSettings,
    Settings,
    StepSettings,
    fields_of,
    fits,
    is_part,
    required_of,
)
from opsd.config.teacher import TeacherConfig
from opsd.config.training import EngineConfig, LoraConfig, LossConfig, OptimConfig, SelectConfig
from opsd.utils.errors import UserError


@dataclass(frozen=True)
class EvalConfig(EvaluationSettings, part="eval"):
    """Evaluation during training."""

    every: NonNegativeInt = 0
    """Steps between evaluations; 0 evaluates at the start and the end only. Needs a suite."""
    suite: tuple[str, ...] = ()
    """NAME=FILE pairs, e.g. math500=data/math500.jsonl; hub:… works as for --prompts."""
    max_new_tokens: PositiveInt | None = None
    """Longest response, in tokens; None: rollout.max_new_tokens."""
    at_start: bool = True
    """Evaluate before the first step."""
    teacher: bool = True
    """Evaluate the teacher once, on the student's prompts, to show the room for improvement. A student that teaches
    itself is evaluated at the start (at_start)."""
    cache: str | None = None
    """Folder in which runs share the evaluations before training (the teacher's, and the student's at the start): an
    existing one for the same models, problems, settings and versions is reused. None is off."""

    def check(self) -> None:
        if self.every and not self.suite:
            raise UserError(f"--eval.every {self.every} without --eval.suite: name a suite, e.g. math500=FILE")


@dataclass(frozen=True)
class EnvironmentConfig(Settings, part="environment"):
    """Episodes of several turns with tools, instead of single answers. Off unless a kind is given."""

    kind: str = "none"
    """Name of an installed environment. travel: --prompts and --eval.suite name travel task files, which python -m
    opsd.environments.travel writes; a response is a whole episode, and rollout.max_new_tokens includes the tools'
    tokens."""
    max_turns: PositiveInt = 50
    """Maximum number of student turns in an episode; a longer one is truncated and has no plan."""
    tool_output_characters: NonNegativeInt = 1024
    """Maximum number of characters of a tool's output that the student sees, half from its start, half from its end; 0:
    all."""
    deepplanning_root: str | None = None
    """Your copy of the DeepPlanning benchmark; its prompts, tool schemas and commonsense score are used for its tasks.
    """

    def check(self) -> None:
        if self.deepplanning_root is not None and self.kind != "travel":
            raise UserError("--environment.deepplanning_root is read with --environment.kind travel only; give both")


@dataclass(frozen=True)
class CheckpointConfig(Settings, part="checkpoint"):
    """Checkpoints are ordinary model folders plus the trainer's state; each is written completely or not at all."""

    every: NonNegativeInt = 50
    """Steps between checkpoints; the last step is always saved. 0 saves the last step only."""
    keep: PositiveInt = 2
    """How many of the newest checkpoints are kept."""


@dataclass(frozen=True)
class TelemetryConfig(Settings, part="telemetry"):
    """Metrics beyond the loss: quadrant shares, overlap of selectors, teacher entropy."""

    every: NonNegativeInt = 10
    """Steps between telemetry, which scores all tokens with both models; a shorter run has it at its last step. 0 is
    off."""
    save_tokens: bool = False
    """Write each telemetry step's per-token statistics to tokens/ (parquet); `opsd inspect` shows them."""
    top_tokens: NonNegativeInt = 0
    """Number of likeliest tokens of both models recorded for each token in tokens/; 0 is none. Costs a forward pass."""
    max_rollouts_saved: PositiveInt = 64
    """Maximum number of rollouts in each file of tokens/, spread evenly over the step's."""
    save_rollouts_every: NonNegativeInt = 10
    """Steps between rollouts/step_N.jsonl files; the first and the last step always have one. 0 is off."""
    options: dict[str, str] = field(default_factory=dict)
    """Additional options of the telemetry, such as its thresholds, as KEY VALUE pairs."""

    def check(self) -> None:
        if self.top_tokens and not (self.save_tokens and self.every):
            raise UserError(
                f"--telemetry.top_tokens {self.top_tokens} is part of the token record: "
                "give --telemetry.save_tokens True and a --telemetry.every above 0"
            )


@dataclass(frozen=True)
class TrackConfig(Settings, part="track"):
    """metrics.jsonl is always written; trackers are optional."""

    wandb: Literal["off", "offline", "online"] = "off"
    """offline: log to local wandb files. online: log to a wandb server."""
    project: str = "opsd"
    """wandb project."""
    tensorboard: bool = False
    """Also write every metric as a curve to RUN/tensorboard; `tensorboard --logdir RUN` shows them."""
    progress: bool = True
    """Print the start lines and show progress: a bar on a terminal, lines elsewhere."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(PromptSettings, StepSettings):
    """On-policy distillation of one student from one teacher.

    In addition to the flags below: --config FILE.yaml reads settings from a file, which flags override; --dump_config
    prints all settings as such a file and exits; --resume RUN continues a run, --resume RUN --steps N extends it.
    """

    student: str
    """Folder (or hub name) of the student to start from."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    teachers: tuple[str, ...] = ()
    """Several teachers instead of --teacher, as NAME=FOLDER pairs, e.g. math=M code=C; each scores the prompts whose
    record names it. --teacher.* applies to each of them."""
    teacher_field: str = "domain"
    """Column that names a prompt's teacher if there are several."""
    trust_remote_code: bool = False
    """Run the code that comes with a model folder (auto_map), for student and teacher; otherwise such a folder is
    refused."""
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
    health: Literal["warn", "stop", "off"] = "warn"
    """Watch lengths, truncation, end tokens, repetition, entropy, loss and reward, and print once, in one line, what
    goes wrong and which flag helps (docs/stops.md has the bounds). stop: also save and end the run; it can be resumed.
    """

    def teacher_paths(self) -> dict[str, str]:
        """Folder (or hub name) of each teacher's (initial) weights, by name; a single teacher has the name ""."""
        if not self.teachers:
            return {"": self.student if self.teacher.is_student else self.teacher.model}
        return dict((name, path) for name, _, path in (pair.partition("=") for pair in self.teachers))

    def teacher_of(self, name: str) -> TeacherConfig:
        """The settings of the teacher of that name."""
        urls = self.teacher.urls
        if self.teachers and self.teacher.kind != "local":
            urls = tuple(url.removeprefix(f"{name}=") for url in urls if url.startswith(f"{name}="))
            if not urls:
                raise UserError(f"--teacher.urls has no server of teacher {name}; add {name}=URL")
        return dataclasses.replace(self.teacher, model=self.teacher_paths()[name], urls=urls)

    def check(self) -> None:
        super().check()
        check_parts(self)


def to_json(config: TrainConfig) -> dict[str, Any]:
    """The resolved configuration as plain JSON values."""
    return dataclasses.asdict(config)


def from_json(values: dict[str, Any]) -> TrainConfig:
    """The inverse of `to_json`. Raises UserError for a setting that is unknown to this version, missing or damaged."""
    return _made(TrainConfig, values, "")


def _made(kind: type[Settings], values: Any, part: str) -> Any:
    """Settings of a type from their JSON values. part: the prefix of their names."""
    if not isinstance(values, dict):
        raise UserError(f"config.json: {part[:-1] or 'it'} is {values!r}, not a group of settings; put it back")
    kinds = fields_of(kind)
    if unknown := next((name for name in values if name not in kinds), None):
        raise UserError(
            f"config.json: {part}{unknown} is not a setting of this version of opsd; use the one that wrote it"
        )
    if missing := [name for name in required_of(kind) if name not in values]:
        raise UserError(f"config.json: {part}{missing[0]} is missing; put it back, or start a new run")
    made = {}
    for name, value in values.items():
        if is_part(kinds[name]):
            made[name] = _made(kinds[name], value, f"{part}{name}.")
        else:
            made[name] = tuple(value) if isinstance(value, list) else value
            if not fits(kinds[name], made[name]):
                raise UserError(f"config.json: {part}{name} is {value!r}; put back what it was, or start a new run")
    return kind(**made)
