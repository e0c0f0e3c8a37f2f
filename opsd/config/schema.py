"""The parts of a run's settings, each a frozen dataclass; opsd/config/train.py puts them together.

Units stand in names or docstrings: tokens, steps, nats, seconds. Defaults are the paper's (Table 9) where it
states one, else what the base repository's users expect.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import arg


@dataclass(frozen=True)
class TeacherConfig:
    """The frozen model that scores every token."""

    model: Annotated[str, arg(name="")]
    """Folder (or hub name) of the teacher."""
    kind: Literal["local", "vllm"] = "local"
    """local: in these processes. vllm: served elsewhere (scripts/serve_teacher.sh). Both give hidden states, and the
    loss the exact divergence over the whole vocabulary."""
    shard: bool = False
    """local: spread its weights over the processes (ZeRO-3), where one GPU cannot hold it; needs engine.kind
    deepspeed."""
    offload: bool = False
    """local: keep the teacher in host memory but while it computes; its head stays on the device."""
    cache: Literal["device", "host"] = "device"
    """Where its hidden states wait for the student's turn; host memory is pinned beside a GPU."""
    urls: tuple[str, ...] = ("http://127.0.0.1:8000",)
    """vllm: one or more replicas."""
    api_key_env: str | None = None
    """vllm: the environment variable that holds the servers' key; the key itself is never written anywhere."""
    timeout_s: float = 300.0
    """vllm: seconds that a request may take."""
    retries: int = 3
    """vllm: further tries of a request that failed, each on the next replica, before the run stops."""


@dataclass(frozen=True)
class RolloutConfig:
    """How the student writes its answers."""

    engine: Literal["hf", "vllm", "vllm_process"] = "hf"
    """hf: transformers generate on the training weights. vllm: vLLM in the training processes. vllm_process: vLLM in
    processes of its own on this machine, which the first rank starts and sends new weights to."""
    samples_per_prompt: int = 16
    """Rollouts per prompt and step."""
    max_prompt_tokens: int = 2048
    """Longest prompt accepted, in tokens."""
    max_new_tokens: int = 8192
    """Longest response, in tokens; a rollout that reaches it is counted as truncated."""
    temperature: float = 1.0
    """Sampling temperature; 1.0 samples from the distribution that is trained."""
    top_p: float = 1.0
    """Nucleus mass; 1.0 is off."""
    top_k: int = 0
    """Most likely tokens sampled from; 0 is off."""
    generate_batch: int = 64
    """Rollouts generated side by side (vllm: by each sampler)."""
    tensor_parallel: int = 1
    """vllm: processes that share one sampler; divides their number."""
    gpu_memory_share: float = 0.4
    """vllm, vllm_process: fraction of each GPU's memory for its weights and key-value cache."""
    samplers: int = 1
    """vllm_process: how many; they share a step's rollouts."""
    sampler_gpus: str = ""
    """vllm_process: the GPU of each, e.g. 6,7; empty: whatever the trainer sees."""
    timeout_s: float = 1200.0
    """vllm_process: longest wait for an answer, in seconds; then the sampler is ended and the run stops. Below
    engine.wait_s, for which the other ranks wait meanwhile."""
    sleep: bool = True
    """vllm: give the GPU's memory back while the student is trained."""
    probe_tolerance: float | None = None
    """vllm: after each sync, how far the sampler's log-probabilities may be from the trainer's on a probe, in mean
    nats a token; None: 1e-3 for float32, 0.1 for bfloat16."""
    overlong_prompts: Literal["error", "drop"] = "error"
    """A prompt over max_prompt_tokens stops the run, or is dropped and counted. It is never cut."""


@dataclass(frozen=True)
class SelectConfig:
    """Which tokens are trained on."""

    by: str = "all"
    """A selector's name (`opsd selectors` lists them) or module:Name; all keeps every token."""
    retention: float = 0.5
    """Fraction of each rollout's tokens that is kept (the paper's ρ), in (0, 1]."""
    normalise_over: Literal["micro_batch", "rollout", "batch", "running"] = "micro_batch"
    """Where min and max are taken. micro_batch depends on how rollouts were packed; rollout and batch do
    not. batch (the paper's word) costs one scoring pass over the step."""
    clip_quantile: float = 0.98
    """Entropy is clipped at this quantile before min-max; 1.0 is off."""
    options: dict[str, str] = field(default_factory=dict)
    """Further options of the selector, as KEY VALUE pairs."""


@dataclass(frozen=True)
class LossConfig:
    """The divergence between student and teacher, per kept token."""

    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    """reverse_kl = KL(student‖teacher); forward_kl = KL(teacher‖student); jsd mixes them by beta."""
    beta: float = 0.5
    """Teacher's share of the JSD mixture, in (0, 1)."""
    temperature: float = 1.0
    """Divides both models' logits."""
    reward_beta: float = 0.0
    """Weigh a prompt's n rollouts by n·softmax(reward/β); needs gold answers. 0 is off."""
    memory: Literal["fused", "whole"] = "fused"
    """fused: memory flat in the number of tokens. whole: kept logits live through backward (baseline)."""
    chunk_tokens: int | Literal["auto"] = "auto"
    """Most tokens whose logits exist at once; auto asks the free memory."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW or plain SGD, with warm-up and cosine decay."""

    kind: Literal["adamw", "sgd"] = "adamw"
    """adamw scales every weight's step to about lr, however small its gradient. sgd (without momentum) does not: a
    tiny gradient stays a tiny step. It wants an lr of another size, reads no beta or eps and keeps no state."""
    lr: float = 1e-6
    """Peak learning rate."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: cosine towards min_lr_fraction, reached one step behind the last; or constant."""
    min_lr_fraction: float = 0.0
    """Where the cosine ends, as a fraction of lr."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    """Global gradient norm is clipped here; 0 is off."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is no finite number, or that has no token to train on: stop the run, or leave the
    step out (optim/skipped is then 1, its rollouts are kept)."""
    max_skipped_steps: int = 10
    """skip: most steps in a row that are left out; one more stops the run."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on a frozen student, in place of training all of its weights. Off unless a rank is given."""

    rank: int = 0
    """Rank of the adapters; 0 trains all weights."""
    alpha: float = 32.0
    """An adapter's output is multiplied by alpha/rank."""
    use_rslora: bool = False
    """Multiply by alpha/√rank instead: the output's size then does not depend on the rank."""
    dropout: float = 0.0
    """Stays 0: scores and gradients must speak of one distribution."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Last names of the layers that get an adapter, e.g. q_proj v_proj; all-linear is all but the head."""


@dataclass(frozen=True)
class EngineConfig:
    """What holds the weights and runs the step."""

    kind: Literal["torch", "deepspeed"] = "torch"
    """torch: one process, plain PyTorch. deepspeed: any number of processes, started by torchrun or deepspeed."""
    zero_stage: Literal[0, 1, 2, 3] = 3
    """deepspeed: what is shared out over the processes. 0: nothing; 1: the optimiser's state; 2: gradients too;
    3: weights too."""
    offload_optimizer: bool = False
    """deepspeed, zero_stage 1 to 3: keep the optimiser's state and fp32 weights in host memory."""
    offload_parameters: bool = False
    """deepspeed, zero_stage 3: keep weights in host memory while no layer needs them."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type; under bfloat16 the optimiser works on fp32 master weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where it is available."""
    micro_batch_tokens: int = 16384
    """Most tokens (prompt and response) packed into one forward pass."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, a third more time."""
    wait_s: float = 1800.0
    """deepspeed: seconds that a process waits for the others before the run stops. One that dies ends all at once; this
    is for one that hangs. Longer than an evaluation or a checkpoint takes the slowest process more than the fastest."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training. Sampling is stated here and never inherited from training."""

    every: int = 0
    """Steps between evaluations; 0 evaluates at the start and the end only. Needs a suite."""
    suite: tuple[str, ...] = ()
    """NAME=FILE pairs, e.g. math500=data/math500.jsonl."""
    samples: int = 16
    """Responses per problem (the k of mean@k)."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int | None = None
    """Longest response in tokens; None takes rollout.max_new_tokens."""
    generate_batch: int = 256
    """Responses generated side by side."""
    limit: int | None = None
    """Only the first so many problems of each suite."""
    grader: str = "math"
    """math: math-verify on the last boxed or final answer. suffix: the response ends with the gold answer.
    Or module:function(response, gold) -> bool."""
    at_start: bool = True
    """Evaluate before the first step."""
    teacher: bool = True
    """Evaluate the teacher once, so that the room for improvement is known."""
    seed: int = 1234
    """Sampling seed of evaluations, apart from the run's: cells of a table share it."""
    cache: str | None = None
    """Folder in which runs share the evaluations before training (the teacher's, and the student's at the start): one
    that is there for the same models, problems, settings and versions is taken, not made again. None is off."""


@dataclass(frozen=True)
class EnvironmentConfig:
    """Episodes of several turns with tools, in place of single answers. Off unless a kind is named."""

    kind: str = "none"
    """The name of an installed environment. travel: --prompts and --eval.suite name travel task files, which
    python -m opsd.environments.travel writes; a response is a whole episode, and rollout.max_new_tokens counts the
    tools' tokens too."""
    max_turns: int = 50
    """Turns of the student in an episode; one that needs more is cut off and has no plan."""
    tool_output_characters: int = 1024
    """Most characters of a tool's output that the student sees, half from its head, half from its tail; 0 is all."""
    deepplanning_root: str | None = None
    """Your copy of the DeepPlanning benchmark: its prompt and schemas for its tasks, its commonsense score."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints are ordinary model folders plus the trainer's state; each appears whole or not at all."""

    every: int = 50
    """Steps between checkpoints; the last step always saves. 0 saves the last step only."""
    keep: int = 2
    """How many of the newest are kept."""


@dataclass(frozen=True)
class TelemetryConfig:
    """Numbers beyond the loss: quadrant shares, overlap of selectors, teacher entropy."""

    every: int = 10
    """Steps between telemetry; it scores all tokens with both models. 0 is off."""
    save_tokens: bool = False
    """Write each telemetry step's per-token statistics to tokens/ (parquet); `opsd inspect` shows them."""
    top_tokens: int = 0
    """How many likeliest tokens of both models stand beside each token in tokens/; 0 is none. Costs a forward pass."""
    max_rollouts_saved: int = 64
    """Rollouts in each file of tokens/, spread evenly over the step's."""
    save_rollouts_every: int = 10
    """Steps between rollouts/step_N.jsonl files; 0 is off."""
    options: dict[str, str] = field(default_factory=dict)
    """Further options of the telemetry, such as its thresholds, as KEY VALUE pairs."""


@dataclass(frozen=True)
class TrackConfig:
    """metrics.jsonl is always written; wandb on request."""

    wandb: Literal["off", "offline", "online"] = "off"
    project: str = "opsd"
    progress: bool = True
    """Show a progress bar on a terminal."""
