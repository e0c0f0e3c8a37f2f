"""How the student generates: sampler, lengths, what ends a response."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from opsd.config.settings import (
    Fraction,
    LengthSettings,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ProperFraction,
    SamplingSettings,
)
from opsd.utils.errors import UserError


@dataclass(frozen=True)
class RolloutConfig(LengthSettings, SamplingSettings, part="rollout"):
    """How the student generates its answers."""

    engine: Literal["hf", "vllm", "vllm_process"] = "hf"
    """hf: transformers generates with the training weights. vllm: vLLM in the training processes. vllm_process: vLLM in
    separate processes on this machine, which the first rank starts and sends new weights to."""
    samples_per_prompt: PositiveInt = 4
    """Rollouts per prompt and step; 16 in the paper."""
    max_prompt_tokens: PositiveInt = 1024
    """Longest prompt accepted, in tokens; 2048 in the paper."""
    max_new_tokens: PositiveInt = 512
    """Longest response, in tokens; a longer one is truncated and counted as such. 8192 in the paper."""
    generate_batch: PositiveInt = 64
    """Rollouts generated in one batch (vllm: by each sampler)."""
    tensor_parallel: PositiveInt = 1
    """vllm: number of ranks that share one sampler; must divide the number of ranks."""
    gpu_memory_share: ProperFraction = 0.4
    """vllm, vllm_process: fraction of each GPU's memory for its weights and key-value cache."""
    samplers: PositiveInt = 1
    """vllm_process: number of samplers; they split a step's rollouts among themselves."""
    sampler_gpus: str = ""
    """vllm_process: one GPU per sampler, e.g. 6,7; empty: the first GPU that the trainer sees, for all."""
    timeout_s: PositiveFloat = 1200.0
    """vllm_process: longest wait for an answer, in seconds; then the sampler is killed and the run stops. Must be below
    engine.wait_s, because the other ranks wait meanwhile."""
    sleep: bool = True
    """vllm: free the sampler's GPU memory while the student is trained."""
    probe_tolerance: PositiveFloat | None = None
    """vllm: largest allowed difference between the sampler's and the trainer's log-probabilities on a probe after each
    sync, in mean nats per token; None: 1e-3 for float32, 0.1 for bfloat16."""
    overlong_prompts: Literal["error", "drop"] = "error"
    """A prompt above max_prompt_tokens stops the run, or is dropped and counted. It is never truncated."""
    horizon: Fraction = 1.0
    """Fraction of max_new_tokens that training answers may use in the first step, in (0, 1]; evaluations are not
    affected. Tokens that are not generated cost nothing (arXiv 2602.15260, 2605.31490)."""
    horizon_steps: NonNegativeInt = 0
    """First step with the full max_new_tokens; horizon grows linearly until then. 0: it never grows."""
    truncated: Literal["keep", "drop", "mask_tail"] = "keep"
    """How a response that reached max_new_tokens is trained on. keep: all of it. drop: none of it. mask_tail: all but
    its tail, i.e. the loop that it ends in, from the second repetition on, and at least its last tenth. Masked tokens
    are neither scored nor counted in the loss's denominator; rollout/left_out_tokens says how many there are."""

    def horizon_at(self, step: int) -> int:
        """Maximum number of new tokens in 1-based `step`, at least 1."""
        grown = (step - 1) / (self.horizon_steps - 1) if self.horizon_steps else 0.0
        fraction = min(1.0, self.horizon + (1.0 - self.horizon) * grown)
        return max(1, int(fraction * self.max_new_tokens + 1e-9))

    def check(self) -> None:
        if self.horizon_steps == 1 or (self.horizon_steps and self.horizon == 1.0):
            raise UserError(
                f"--rollout.horizon_steps {self.horizon_steps} with --rollout.horizon {self.horizon:g}: nothing grows; "
                "give 2 steps or more and a fraction below 1, e.g. 0.1"
            )
        gpus = self.sampler_gpus.split(",") if self.sampler_gpus else []
        if gpus and (len(gpus) != self.samplers or not all(gpu.strip() for gpu in gpus)):
            raise UserError(
                f"--rollout.sampler_gpus {self.sampler_gpus}: give one GPU for each of the {self.samplers} "
                "--rollout.samplers, e.g. 6,7"
            )
        if self.engine == "vllm_process" and self.tensor_parallel > 1:
            raise UserError(
                f"--rollout.tensor_parallel {self.tensor_parallel}: a separate sampler process has one GPU; "
                "give more --rollout.samplers, or --rollout.engine vllm"
            )
