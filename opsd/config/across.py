"""Checks a run's settings across its parts; each part has checked itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opsd.utils.errors import UserError

if TYPE_CHECKING:
    from opsd.config.schema import TrainConfig


def check_parts(config: TrainConfig) -> None:
    """Raises UserError if two parts of `config` contradict each other."""
    if config.optim.warmup_steps > config.steps:
        raise UserError(f"--optim.warmup_steps {config.optim.warmup_steps}: give at most --steps ({config.steps})")
    if config.loss.reads_rewards and config.rollout.horizon < 1.0:
        raise UserError(
            f"--rollout.horizon {config.rollout.horizon:g} cuts answers before they can earn a reward: give 1, or "
            "leave out --loss.reward_beta and --loss.prompt_weights"
        )
    _check_teacher(config)
    r, loss = config.rollout, config.loss
    if loss.divergence == "sampled_token" and (r.temperature, r.top_p, r.top_k) != (loss.temperature, 1.0, 0):
        raise UserError(
            "--loss.divergence sampled_token needs samples from the trained distribution: give --rollout.temperature "
            f"{loss.temperature:g} (--loss.temperature), --rollout.top_p 1 and --rollout.top_k 0"
        )
    wait_s, sharded = r.timeout_s, config.engine.kind == "deepspeed"
    if r.engine == "vllm_process" and sharded and wait_s >= config.engine.wait_s:
        raise UserError(
            f"--rollout.timeout_s {wait_s:g} is not below --engine.wait_s {config.engine.wait_s:g}: the other ranks "
            "would give up first; make one smaller or the other larger"
        )


def _check_teacher(config: TrainConfig) -> None:
    teacher, sharded, served = config.teacher, config.engine.kind == "deepspeed", config.teacher.kind != "local"
    if teacher.shard and (served or not sharded):
        raise UserError("--teacher.shard True needs --teacher.kind local and --engine.kind deepspeed")
    if config.teachers:
        _check_several(config)
    evaluated = config.eval.suite and config.eval.teacher and not teacher.is_student
    if evaluated and (served or teacher.shard or config.teachers):
        raise UserError(
            "a served or sharded teacher cannot generate answers, nor can several together: give --eval.teacher False"
        )
    if teacher.kind == "logprobs":
        _check_logprobs(config)


def _check_several(config: TrainConfig) -> None:
    for pair in config.teachers:
        name, _, path = pair.partition("=")
        if not (name and path):
            raise UserError(f"--teachers {pair}: give NAME=FOLDER, e.g. math=models/math")
    names = config.teacher_paths()
    if len(names) < len(config.teachers):
        raise UserError(f"--teachers {' '.join(config.teachers)}: names a teacher twice; give each a different name")
    if config.teacher.model:
        raise UserError(f"--teacher {config.teacher.model} with --teachers: add it to these, or give it alone")
    if config.teacher.context is not None:
        raise UserError("--teacher.context works with one teacher only; give --teacher instead of --teachers")
    for name in names:
        config.teacher_of(name)  # raises if a served teacher has no server


def _check_logprobs(config: TrainConfig) -> None:
    for flag, value, needed in (
        ("loss.temperature", config.loss.temperature, 1.0),
        ("loss.memory", config.loss.memory, "fused"),
        ("telemetry.top_tokens", config.telemetry.top_tokens, 0),
    ):
        if value != needed:
            raise UserError(
                f"--{flag} {value}: --teacher.kind logprobs does not provide enough for that; give {needed}"
            )
