"""The checks of a run's settings, before anything runs: of each value, and of values against each other."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from opsd.utils.errors import UserError

if TYPE_CHECKING:
    from opsd.config.schema import EngineConfig
    from opsd.config.train import TrainConfig


# Whatever is counted or measured here stays far below; a count beyond it would run for ever.
MOST = 2**31 - 1


def check(config: TrainConfig) -> None:
    """The one place for checks of values and of fields against each other. Raises UserError."""
    _positive("steps", config.steps)
    _positive("prompts_per_step", config.prompts_per_step)
    if config.thinking == "on" and config.prompt_format == "raw":
        raise UserError("--thinking on is part of a chat template; give --prompt_format chat with it")
    for part in (_teacher, _rollout, _selection_and_loss, _optimiser, _lora, _evaluation, _telemetry, _environment):
        part(config)
    _positive("engine.micro_batch_tokens", config.engine.micro_batch_tokens)
    _positive("engine.wait_s", config.engine.wait_s)
    _offload(config.engine)
    _not_negative("checkpoint.every", config.checkpoint.every)
    _positive("checkpoint.keep", config.checkpoint.keep)


def _teacher(c: TrainConfig) -> None:
    _positive("teacher.timeout_s", c.teacher.timeout_s)
    _not_negative("teacher.retries", c.teacher.retries)
    served = c.teacher.kind == "vllm"
    if served and not c.teacher.urls:
        raise UserError("--teacher.urls names no server; give at least one, e.g. http://127.0.0.1:8000")
    for url in c.teacher.urls:
        if any(sign in url for sign in "@?#"):
            raise UserError(
                "--teacher.urls holds a user, password or query, which would end up in config.json; give the address "
                "alone, and the name of the variable that holds the key with --teacher.api_key_env"
            )
    if c.teacher.shard and (served or c.engine.kind != "deepspeed"):
        raise UserError("--teacher.shard True needs --teacher.kind local and --engine.kind deepspeed")
    if (served or c.teacher.shard) and c.eval.suite and c.eval.teacher:
        raise UserError("a teacher that is served or sharded gives no answers of its own: give --eval.teacher False")


def _rollout(c: TrainConfig) -> None:
    for name in ("samples_per_prompt", "max_prompt_tokens", "max_new_tokens", "generate_batch", "tensor_parallel"):
        _positive(f"rollout.{name}", getattr(c.rollout, name))
    _samplers(c)
    if not 0.0 < c.rollout.gpu_memory_share < 1.0:
        raise UserError(f"--rollout.gpu_memory_share {c.rollout.gpu_memory_share}: give a fraction between 0 and 1")
    if c.rollout.probe_tolerance is not None:
        _positive("rollout.probe_tolerance", c.rollout.probe_tolerance)
    _sampling("rollout", c.rollout.temperature, c.rollout.top_p, c.rollout.top_k)


def _samplers(c: TrainConfig) -> None:
    _positive("rollout.samplers", c.rollout.samplers)
    _positive("rollout.timeout_s", c.rollout.timeout_s)
    gpus = c.rollout.sampler_gpus.split(",") if c.rollout.sampler_gpus else []
    if gpus and (len(gpus) != c.rollout.samplers or not all(gpu.strip() for gpu in gpus)):
        raise UserError(
            f"--rollout.sampler_gpus {c.rollout.sampler_gpus}: give one GPU for each of the "
            f"{c.rollout.samplers} --rollout.samplers, e.g. 6,7"
        )
    if c.rollout.engine == "vllm_process" and c.engine.kind == "deepspeed" and c.rollout.timeout_s >= c.engine.wait_s:
        raise UserError(
            f"--rollout.timeout_s {c.rollout.timeout_s:g} is not below --engine.wait_s {c.engine.wait_s:g}: the other "
            "ranks would give up first; make one smaller or the other larger"
        )
    if c.rollout.engine == "vllm_process" and c.rollout.tensor_parallel > 1:
        raise UserError(
            f"--rollout.tensor_parallel {c.rollout.tensor_parallel}: a sampler in a process of its own has one GPU; "
            "give more --rollout.samplers, or --rollout.engine vllm"
        )


def _selection_and_loss(c: TrainConfig) -> None:
    if not 0.0 < c.select.retention <= 1.0:
        raise UserError(f"--select.retention {c.select.retention}: give a fraction in (0, 1], e.g. 0.5")
    if not 0.0 < c.select.clip_quantile <= 1.0:
        raise UserError(f"--select.clip_quantile {c.select.clip_quantile}: give a quantile in (0, 1]")
    if c.loss.divergence == "jsd" and not 0.0 < c.loss.beta < 1.0:
        raise UserError(f"--loss.beta {c.loss.beta}: give a share in (0, 1); for its ends use reverse_kl or forward_kl")
    _not_negative("loss.reward_beta", c.loss.reward_beta)
    if not (c.loss.temperature > 0.0 and math.isfinite(c.loss.temperature)):
        raise UserError(f"--loss.temperature {c.loss.temperature}: give a number above 0")
    if c.loss.chunk_tokens != "auto":
        _positive("loss.chunk_tokens", c.loss.chunk_tokens)


def _optimiser(c: TrainConfig) -> None:
    if not (c.optim.lr > 0.0 and math.isfinite(c.optim.lr)):
        raise UserError(f"--optim.lr {c.optim.lr}: give a learning rate above 0")
    if not 0 <= c.optim.warmup_steps <= c.steps:
        raise UserError(f"--optim.warmup_steps {c.optim.warmup_steps}: give 0 to --steps ({c.steps})")
    for name in ("weight_decay", "max_grad_norm", "min_lr_fraction", "beta1", "beta2", "eps"):
        _not_negative(f"optim.{name}", getattr(c.optim, name))
    for name in ("beta1", "beta2"):
        if getattr(c.optim, name) >= 1.0:
            raise UserError(f"--optim.{name} {getattr(c.optim, name)}: give a decay in [0, 1)")
    _not_negative("optim.max_skipped_steps", c.optim.max_skipped_steps)
    if c.optim.min_lr_fraction > 1.0:
        raise UserError(f"--optim.min_lr_fraction {c.optim.min_lr_fraction}: give a fraction in [0, 1]")


def _lora(c: TrainConfig) -> None:
    lora = c.lora
    _not_negative("lora.rank", lora.rank)
    if lora.dropout:
        raise UserError(
            f"--lora.dropout {lora.dropout}: give 0; scores and gradients must speak of one distribution, so this "
            "trainer uses no dropout"
        )
    if not (lora.alpha > 0.0 and math.isfinite(lora.alpha)):
        raise UserError(f"--lora.alpha {lora.alpha}: give a number above 0")
    if not lora.target_modules or ("all-linear" in lora.target_modules and len(lora.target_modules) > 1):
        raise UserError(
            f"--lora.target_modules {' '.join(lora.target_modules)}: give all-linear alone, or names of layers"
        )
    if not lora.rank and lora != type(lora)():
        raise UserError("--lora.* is set but --lora.rank is 0, which trains all weights; give a rank, e.g. 16")


def _evaluation(c: TrainConfig) -> None:
    _not_negative("eval.every", c.eval.every)
    _positive("eval.samples", c.eval.samples)
    _positive("eval.generate_batch", c.eval.generate_batch)
    _sampling("eval", c.eval.temperature, c.eval.top_p, c.eval.top_k)
    for name in ("limit", "max_new_tokens"):
        if getattr(c.eval, name) is not None:
            _positive(f"eval.{name}", getattr(c.eval, name))
    if c.eval.every and not c.eval.suite:
        raise UserError(f"--eval.every {c.eval.every} without --eval.suite: name a suite, e.g. math500=FILE")


def _telemetry(c: TrainConfig) -> None:
    for name in ("every", "save_rollouts_every", "top_tokens"):
        _not_negative(f"telemetry.{name}", getattr(c.telemetry, name))
    _positive("telemetry.max_rollouts_saved", c.telemetry.max_rollouts_saved)
    if c.telemetry.top_tokens and not (c.telemetry.save_tokens and c.telemetry.every):
        raise UserError(
            f"--telemetry.top_tokens {c.telemetry.top_tokens} is part of the token record: "
            "give --telemetry.save_tokens True and a --telemetry.every above 0"
        )


def _environment(c: TrainConfig) -> None:
    _positive("environment.max_turns", c.environment.max_turns)
    _not_negative("environment.tool_output_characters", c.environment.tool_output_characters)
    if c.environment.deepplanning_root is not None and c.environment.kind != "travel":
        raise UserError("--environment.deepplanning_root is read with --environment.kind travel only; give both")


def _offload(engine: EngineConfig) -> None:
    sharded = engine.kind == "deepspeed"
    if engine.offload_optimizer and not (sharded and engine.zero_stage >= 1):
        raise UserError("--engine.offload_optimizer True needs --engine.kind deepspeed with --engine.zero_stage 1 to 3")
    if engine.offload_parameters and not (sharded and engine.zero_stage == 3):
        raise UserError("--engine.offload_parameters True needs --engine.kind deepspeed with --engine.zero_stage 3")


def _sampling(part: str, temperature: float, top_p: float, top_k: int) -> None:
    if not (temperature >= 0.0 and math.isfinite(temperature)):
        raise UserError(f"--{part}.temperature {temperature}: give 0 (greedy) or more")
    if not 0.0 < top_p <= 1.0:
        raise UserError(f"--{part}.top_p {top_p}: give a mass in (0, 1]")
    _not_negative(f"{part}.top_k", top_k)


def _positive(name: str, value: float) -> None:
    if not (value > 0 and value <= MOST):  # so that NaN is refused too
        raise UserError(f"--{name} {value}: give a number above 0, at most {MOST}")


def _not_negative(name: str, value: float) -> None:
    if not 0 <= value <= MOST:
        raise UserError(f"--{name} {value}: give 0 or more, at most {MOST}")
