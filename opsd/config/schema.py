"""Every setting of a run, in frozen dataclasses. The command line is made from these; so is config.json.

Units stand in names or docstrings: tokens, steps, nats, seconds. Defaults are the paper's (Table 9) but for sizes:
those let a pair of half a billion parameters train on a laptop, and recipes/ state the paper's.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from tyro.conf import arg

from opsd.config.across import check_parts
from opsd.config.settings import (
    EvaluationSettings,
    Fraction,
    FractionBelowOne,
    FractionFromZero,
    LengthSettings,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PromptSettings,
    ProperFraction,
    SamplingSettings,
    Settings,
    StepSettings,
    fields_of,
    fits,
    is_part,
    required_of,
)
from opsd.utils.errors import UserError


@dataclass(frozen=True)
class TeacherConfig(Settings, part="teacher"):
    """The frozen model that scores every token."""

    model: Annotated[str, arg(name="")] = ""
    """Folder (or hub name) of the teacher; self: the student teaches itself. For several teachers use --teachers."""
    weights: Literal["initial", "ema", "current"] = "initial"
    """self: the student's starting weights (with adapters: the base model without them, at no extra memory), an
    exponential moving average of its weights in fp32, or its current weights."""
    ema: FractionBelowOne = 0.99
    """self, ema: at each refresh the average becomes ema times itself plus 1 - ema times the student."""
    every: PositiveInt = 1
    """self, ema or current: steps between refreshes."""
    context: str | None = None
    """A text file that replaces a prompt's last message for the teacher, so that it sees more than the student.
    {prompt}, {answer} and {any column} stand for the record's values, {rollout} for another sample of the same prompt
    and step that was rewarded (if there is none, the teacher reads the student's prompt)."""
    max_prompt_tokens: PositiveInt = 8192
    """With context: longest prompt of the teacher, in tokens. A prompt whose context is longer is dropped and counted;
    a {rollout} that would make it longer is not used."""
    kind: Literal["local", "vllm", "logprobs"] = "local"
    """local: in the training processes. vllm: served elsewhere (scripts/serve_teacher.sh). Both return hidden states,
    so the divergence is exact over the whole vocabulary. logprobs: any server that answers /v1/completions with
    prompt_logprobs (as vLLM does); only the teacher's tokenizer and config.json are needed here. It returns the
    likeliest tokens; all others form one bucket."""
    top_logprobs: PositiveInt = 20
    """logprobs: number of likeliest tokens requested per position, in addition to the sampled one. At most what the
    server allows (vLLM: --max-logprobs)."""
    shard: bool = False
    """local: shard its weights over the processes (ZeRO-3), for a teacher that does not fit on one GPU; needs
    engine.kind deepspeed."""
    offload: bool = False
    """local: keep the teacher in host memory except during its forward pass; its head stays on the device."""
    cache: Literal["device", "host"] = "device"
    """Where its hidden states are kept until the student's stage; host memory is pinned if there is a GPU."""
    urls: tuple[str, ...] = ("http://127.0.0.1:8000",)
    """vllm, logprobs: address of one or more replicas; with several teachers NAME=URL."""
    api_key_env: str | None = None
    """vllm, logprobs: the environment variable that holds the servers' key; the key is never written anywhere."""
    timeout_s: PositiveFloat = 300.0
    """vllm, logprobs: timeout of a request, in seconds."""
    retries: NonNegativeInt = 3
    """vllm, logprobs: how often a failed request is retried, each time on the next replica, before the run stops."""

    @property
    def is_student(self) -> bool:
        """Whether the student teaches itself."""
        return self.model == "self"

    @property
    def follows(self) -> bool:
        """Whether its weights change with the student's."""
        return self.is_student and self.weights != "initial"

    def check(self) -> None:
        if self.weights != "initial" and not self.is_student:
            raise UserError(f"--teacher.weights {self.weights} needs --teacher self, not {self.model}")
        if self.every > 1 and not self.follows:
            raise UserError(f"--teacher.every {self.every} needs --teacher self with --teacher.weights ema or current")
        if self.ema != TeacherConfig.ema and self.weights != "ema":
            raise UserError(f"--teacher.ema {self.ema} needs --teacher self with --teacher.weights ema")
        if self.follows and (self.kind != "local" or self.shard or self.offload):
            raise UserError(
                f"--teacher.weights {self.weights}: this teacher is held in the student, with its sharding; leave out "
                "--teacher.kind, --teacher.shard and --teacher.offload"
            )
        if self.kind != "local" and not self.urls:
            raise UserError("--teacher.urls names no server; give at least one, e.g. http://127.0.0.1:8000")
        if any(sign in url for url in self.urls for sign in "@?#"):
            raise UserError(
                "--teacher.urls holds a user, password or query, which would end up in config.json; give only the "
                "address, and with --teacher.api_key_env the name of the variable that holds the key"
            )


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
        """Tokens that answers are written to in 1-based `step`, at least 1."""
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
        """Whether rewards weigh the loss."""
        return bool(self.reward_beta) or self.prompt_weights != "none"

    def divergence_at(self, step: int) -> str:
        """What is trained in 1-based `step`."""
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
    """Steps between telemetry, which scores all tokens with both models. 0 is off."""
    save_tokens: bool = False
    """Write each telemetry step's per-token statistics to tokens/ (parquet); `opsd inspect` shows them."""
    top_tokens: NonNegativeInt = 0
    """Number of likeliest tokens of both models recorded for each token in tokens/; 0 is none. Costs a forward pass."""
    max_rollouts_saved: PositiveInt = 64
    """Maximum number of rollouts in each file of tokens/, spread evenly over the step's."""
    save_rollouts_every: NonNegativeInt = 10
    """Steps between rollouts/step_N.jsonl files; 0 is off."""
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
    """metrics.jsonl is always written; wandb is optional."""

    wandb: Literal["off", "offline", "online"] = "off"
    """offline: log to local wandb files. online: log to a wandb server."""
    project: str = "opsd"
    """wandb project."""
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
        """By name, folder (or hub name) of each teacher's weights, or of those that it starts from; one has no name."""
        if not self.teachers:
            return {"": self.student if self.teacher.is_student else self.teacher.model}
        return dict((name, path) for name, _, path in (pair.partition("=") for pair in self.teachers))

    def teacher_of(self, name: str) -> TeacherConfig:
        """What holds for the teacher of that name."""
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
    """The inverse of `to_json`. Raises UserError for a setting that this version does not know, or that is damaged."""
    return _made(TrainConfig, values, "")


def _made(kind: type[Settings], values: Any, part: str) -> Any:
    """Settings of a type, from what JSON makes of them. part: what their names begin with."""
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
