"""Builds the sampler of the rollouts and the selector of their tokens."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from opsd.config import RolloutConfig, SelectConfig, TrainConfig
from opsd.engine import Engine, settled
from opsd.rollout import HFRollout, RolloutEngine
from opsd.selection import ALL_TOKENS, TokenSelector, load_selector, selector_takes
from opsd.utils.distributed import world_size
from opsd.utils.errors import UserError


def check_rollout(rollout: RolloutConfig) -> None:
    """Raises UserError if the configured sampler cannot run here, before minutes are spent on loading."""
    if rollout.engine != "hf":
        if importlib.util.find_spec("vllm") is None:
            raise UserError(f"--rollout.engine {rollout.engine}: vLLM is not installed; run `make setup`, or give hf")
        if world_size() % rollout.tensor_parallel:
            raise UserError(
                f"--rollout.tensor_parallel {rollout.tensor_parallel} does not divide the {world_size()} processes; "
                "give a number that does"
            )


def build_rollout(
    config: TrainConfig,
    path: str,
    tokenizer: Any,
    engine: Engine,
    vocab_size: int,
    longest: int,
    switches: frozenset[int],
    ends: Sequence[int],
) -> RolloutEngine:
    """The sampler that `config` names; path: a folder with the plain weights of the engine's student.

    vocab_size: only ids below it are sampled. longest: tokens of the longest sequence. switches: see `decode`.
    ends: the tokens that end a response.
    """
    r = config.rollout
    if r.engine == "hf":
        how = (r.generate_batch, engine.sampling, engine.ranks, vocab_size, switches, ends)
        return HFRollout(engine.student.model, tokenizer, *how)
    settings = {
        "path": path,
        "eos_ids": list(ends),
        "dtype": settled(config.engine, engine.device).dtype,
        "max_model_tokens": longest,
        "batch_rollouts": r.generate_batch,
        "memory_share": r.gpu_memory_share,
        "trust": config.trust_remote_code,
        "vocab_size": vocab_size,
    }
    if r.engine == "vllm":
        from opsd.rollout.vllm import VLLMRollout

        return VLLMRollout(engine, r, settings)
    from opsd.rollout.vllm_process import VLLMProcessRollout

    return VLLMProcessRollout(engine, r, settings)


def build_selector(select: SelectConfig) -> TokenSelector | None:
    """The configured selector; it gets its retention, and the settings that may differ from its own defaults."""
    if select.by == ALL_TOKENS:
        return None
    defaults = SelectConfig()
    options: dict[str, Any] = {"retention": select.retention}
    if select.clip_quantile != defaults.clip_quantile:
        options["clip_quantile"] = select.clip_quantile
    scope = select.normalise_over
    # A rule's own default is micro_batch. The trainer's default, batch, is passed only to a rule that has the option.
    if scope != "micro_batch" and (scope != defaults.normalise_over or selector_takes(select.by, "normalise_over")):
        options["normalise_over"] = scope
    return load_selector(select.by, **(options | select.options))
