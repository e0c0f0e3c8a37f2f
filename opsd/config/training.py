"""What is trained on and how: selection, loss, optimiser, adapters, engine."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from opsd.config.settings import (
    Fraction,
    FractionBelowOne,
    FractionFromZero,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Settings,
)
from opsd.utils.errors import UserError


@dataclass(frozen=True)
class SelectConfig(Settings, part="select"):
    """Which tokens are trained on."""

    by: str = "all"
    """Name of a selector (`opsd selectors` lists them) or module:Name; all keeps every token."""
    retention: Fraction = 0.5
    """Fraction of each rollout's tokens that is kept (the paper's ρ), in (0, 1]."""
    normalise_over: Literal["micro_batch", "rollout", "batch", "running"] = "batch"
    """The tokens over which rules that scale by min and max take these; other rules ignore it. batch is the paper's
    choice and costs one extra pass over the step, without gradients. rollout and running cost nothing; micro_batch
    costs nothing either, but depends on how rollouts were packed."""
    clip_quantile: Fraction = 0.98
    """Entropy is clipped at this quantile before min-max scaling; 1.0 is off."""
    stop_token: Literal["as_scored", "always", "never"] = "as_scored"
    """The end-of-turn token of a response. as_scored: like any other token, kept or not by the rule (the paper's).
    always: trained on in addition to what the rule keeps, so every response teaches when to end. never: masked out, so
    when to end is learnt only from tokens at which the response continued. The loss is divided by the number of tokens
    trained on. With always and never, rules whose count follows from lengths cost an extra forward pass, unless they
    normalise over the batch."""
    options: dict[str, str] = field(default_factory=dict)
    """Additional options of the selector, as KEY VALUE pairs."""


@dataclass(frozen=True)
class LossConfig(Settings, part="loss"):
    """The divergence between student and teacher, per kept token."""

    divergence: Literal["reverse_kl", "forward_kl", "jsd", "eopd", "forward_then_reverse", "sampled_token"] = (
        "reverse_kl"
    )
    """reverse_kl = KL(student‖teacher); forward_kl = KL(teacher‖student); jsd mixes them by beta. eopd: reverse_kl,
    plus forward_kl where the teacher is uncertain. forward_then_reverse: forward_kl for warmup_steps, then reverse_kl.
    sampled_token: a policy gradient with the log-ratio at the sampled token, equal to reverse_kl's gradient in
    expectation."""
    entropy_threshold: NonNegativeFloat = 0.8
    """eopd: teacher entropy in nats above which forward_kl is added; 0.8 is that paper's (arXiv 2603.07079)."""
    warmup_steps: NonNegativeInt = 0
    """forward_then_reverse: steps of forward_kl before reverse_kl."""
    beta: float = 0.5
    """Teacher's share of the JSD mixture, in (0, 1)."""
    temperature: PositiveFloat = 1.0
    """Both models' logits are divided by it."""
    reward_beta: NonNegativeFloat = 0.0
    """Weight a prompt's n rollouts by n·softmax(reward/β); needs gold answers. 0 is off."""
    prompt_weights: Literal["none", "paced"] = "none"
    """paced: weight each prompt by p·(1−p), where p is the mean reward of its rollouts in this step, scaled to mean 1
    over the step's prompts (arXiv 2603.11178); needs gold answers."""
    memory: Literal["fused", "whole"] = "fused"
    """fused: memory does not grow with the number of tokens. whole: the kept tokens' logits stay in memory until the
    backward pass (a baseline)."""
    chunk_tokens: PositiveInt | Literal["auto"] = "auto"
    """Maximum number of tokens whose logits exist at once; auto chooses it by free memory."""

    @property
    def reads_rewards(self) -> bool:
        """Whether rewards weight the loss."""
        return bool(self.reward_beta) or self.prompt_weights != "none"

    def divergence_at(self, step: int) -> str:
        """The divergence that is trained in 1-based `step`."""
        if self.divergence != "forward_then_reverse":
            return self.divergence
        return "forward_kl" if step <= self.warmup_steps else "reverse_kl"

    def check(self) -> None:
        if (self.divergence == "forward_then_reverse") != (self.warmup_steps > 0):
            raise UserError(
                f"--loss.divergence {self.divergence} with --loss.warmup_steps {self.warmup_steps}: "
                "forward_then_reverse needs steps above 0, other divergences have none"
            )
        if self.divergence == "jsd" and not 0.0 < self.beta < 1.0:
            raise UserError(
                f"--loss.beta {self.beta}: give a share in (0, 1); for its ends use reverse_kl or forward_kl"
            )


@dataclass(frozen=True)
class OptimConfig(Settings, part="optim"):
    """AdamW or plain SGD, with warm-up and cosine decay."""

    kind: Literal["adamw", "sgd"] = "adamw"
    """adamw scales every weight's step to about lr, however small its gradient. sgd (without momentum) does not: a tiny
    gradient stays a tiny step. sgd needs a different lr, ignores beta and eps and keeps no state."""
    lr: PositiveFloat = 1e-6
    """Peak learning rate."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After warm-up: cosine decay towards min_lr_fraction, which is reached one step after the last; or constant."""
    min_lr_fraction: FractionFromZero = 0.0
    """Final learning rate of the cosine, as a fraction of lr."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    beta1: FractionBelowOne = 0.9
    """adamw: decay rate of the moving average of gradients."""
    beta2: FractionBelowOne = 0.999
    """adamw: decay rate of the moving average of squared gradients."""
    eps: NonNegativeFloat = 1e-8
    """adamw: added to the denominator of its step."""
    max_grad_norm: NonNegativeFloat = 1.0
    """The global gradient norm is clipped to this; 0 is off."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """For a step whose loss or gradient is NaN or infinite, or that has no token to train on: stop the run, or skip the
    step (optim/skipped is then 1 and its rollouts are saved)."""
    max_skipped_steps: NonNegativeInt = 10
    """skip: maximum number of consecutive skipped steps; one more stops the run."""


@dataclass(frozen=True)
class LoraConfig(Settings, part="lora"):
    """Low-rank adapters on a frozen student, instead of training all of its weights. Off unless a rank is given."""

    rank: NonNegativeInt = 0
    """Rank of the adapters; 0 trains all weights."""
    alpha: PositiveFloat = 32.0
    """An adapter's output is multiplied by alpha/rank."""
    use_rslora: bool = False
    """Multiply by alpha/√rank instead, so that the output's size does not depend on the rank."""
    dropout: float = 0.0
    """Must stay 0: scoring and training must use the same distribution."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Last part of the names of the layers that get an adapter, e.g. q_proj v_proj; all-linear: all but the LM head."""

    def check(self) -> None:
        if self.dropout:
            raise UserError(
                f"--lora.dropout {self.dropout}: give 0; scoring and training must use the same distribution, so this "
                "trainer uses no dropout"
            )
        if not self.target_modules or ("all-linear" in self.target_modules and len(self.target_modules) > 1):
            raise UserError(
                f"--lora.target_modules {' '.join(self.target_modules)}: give all-linear alone, or names of layers"
            )
        if not self.rank and any(
            getattr(self, setting.name) != setting.default for setting in dataclasses.fields(self)
        ):
            raise UserError("--lora.* is set but --lora.rank is 0, which trains all weights; give a rank, e.g. 16")


@dataclass(frozen=True)
class EngineConfig(Settings, part="engine"):
    """Where weights are held and how a step runs."""

    kind: Literal["torch", "deepspeed"] = "torch"
    """torch: one process, plain PyTorch. deepspeed: any number of processes, started by torchrun or deepspeed."""
    zero_stage: Literal[0, 1, 2, 3] = 3
    """deepspeed: what is sharded over the processes. 0: nothing; 1: optimiser state; 2: gradients too; 3: weights too.
    """
    offload_optimizer: bool = False
    """deepspeed, zero_stage 1 to 3: keep optimiser state and fp32 master weights in host memory."""
    offload_parameters: bool = False
    """deepspeed, zero_stage 3: keep weights in host memory while no layer uses them."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; with bfloat16 the optimiser updates fp32 master weights. auto: bfloat16 on a GPU that supports it,
    else float32; config.json records which one was used."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if available, else the CPU."""
    micro_batch_tokens: PositiveInt = 4096
    """Maximum number of tokens (prompt and response) packed into one forward pass; 16384 in the paper."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    wait_s: PositiveFloat = 1800.0
    """deepspeed: how long a process waits for the others before the run stops, in seconds. A process that dies ends all
    others at once; this is for one that hangs. It must exceed the time by which the slowest process may lag behind the
    fastest in an evaluation or checkpoint."""

    def check(self) -> None:
        sharded = self.kind == "deepspeed"
        if self.offload_optimizer and not (sharded and self.zero_stage >= 1):
            raise UserError(
                "--engine.offload_optimizer True needs --engine.kind deepspeed with --engine.zero_stage 1 to 3"
            )
        if self.offload_parameters and not (sharded and self.zero_stage == 3):
            raise UserError("--engine.offload_parameters True needs --engine.kind deepspeed with --engine.zero_stage 3")
