"""A run's settings against each other, across its parts; each part has checked itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opsd.utils.errors import UserError

if TYPE_CHECKING:
    from opsd.config.schema import TrainConfig


def check_parts(config: TrainConfig) -> None:
    """Raises UserError where two parts of `config` do not fit each other."""
    if config.optim.warmup_steps > config.steps:
        raise UserError(f"--optim.warmup_steps {config.optim.warmup_steps}: give 0 to --steps ({config.steps})")
    if config.loss.reads_rewards and config.rollout.horizon < 1.0:
        raise UserError(
            f"--rollout.horizon {config.rollout.horizon:g} cuts answers before they can earn a reward: give 1, or "
            "leave out --loss.reward_beta and --loss.prompt_weights"
        )
    sharded, served = config.engine.kind == "deepspeed", config.teacher.kind == "vllm"
    if config.teacher.shard and (served or not sharded):
        raise UserError("--teacher.shard True needs --teacher.kind local and --engine.kind deepspeed")
    if (served or config.teacher.shard) and config.eval.suite and config.eval.teacher:
        raise UserError("a teacher that is served or sharded gives no answers of its own: give --eval.teacher False")
    wait_s = config.rollout.timeout_s
    if config.rollout.engine == "vllm_process" and sharded and wait_s >= config.engine.wait_s:
        raise UserError(
            f"--rollout.timeout_s {wait_s:g} is not below --engine.wait_s {config.engine.wait_s:g}: the other ranks "
            "would give up first; make one smaller or the other larger"
        )
