"""Everything a run is made of, loaded and checked before anything is written."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from opsd.config import LoraConfig, RolloutConfig, SelectConfig, TrainConfig
from opsd.data.prompts import PromptFormat, PromptStream, load_prompts
from opsd.data.template import Clock, steady
from opsd.engine import Engine, build_engine
from opsd.environments import load_environment
from opsd.eval.cache import Models
from opsd.eval.evaluator import Evaluator, load_suites
from opsd.model.checks import shared_vocabulary
from opsd.model.loading import load_scorer, load_tokenizer
from opsd.model.lora import ADAPTER_FOLDER, add_adapters, load_adapters
from opsd.model.scorer import Scorer
from opsd.rollout import HFRollout, RolloutEngine
from opsd.run.began import Began
from opsd.run.tracking import check_wandb
from opsd.selection import ALL_TOKENS, TokenSelector, TokenTelemetry, load_selector, load_telemetry
from opsd.teacher import LocalTeacher, Teacher
from opsd.types import Sampling
from opsd.utils.distributed import Ranks, local_device, world_size
from opsd.utils.errors import UserError
from opsd.utils.oom import memory_for


@dataclass(frozen=True)
class Parts:
    """The parts of a run, in the order a step uses them. dropped_prompts: over-long ones that were left out."""

    ranks: Ranks
    began: Began
    tokenizer: Any
    prompts: PromptStream
    dropped_prompts: int
    sampler: RolloutEngine
    sampling: Sampling
    teacher: Teacher
    teacher_sampler: RolloutEngine | None
    selector: TokenSelector | None
    vocab_size: int
    engine: Engine
    evaluator: Any
    telemetry: list[TokenTelemetry]

    def models(self) -> Models:
        """What an evaluation reads of them."""
        return Models(self.evaluator, self.sampler, self.teacher_sampler, self.ranks, self.engine.device)


@memory_for("loading", "then start again")
def assemble(config: TrainConfig, ranks: Ranks, checkpoint: Path | None = None, began: Began | None = None) -> Parts:
    """Load what `config` names; the student from `checkpoint` where one is given.

    began: what the run began with, if it goes on: the prompts must be the same.
    Raises UserError for whatever cannot serve. Writes nothing.
    """
    check_wandb(config)
    check_rollout(config.rollout)
    check_adapters(config.lora)
    selector = build_selector(config.select)
    student_path = config.student if checkpoint is None else str(checkpoint)
    tokenizer = load_tokenizer(student_path, "--student", config.trust_remote_code)
    teacher_tokenizer = load_tokenizer(config.teacher.model, "--teacher", config.trust_remote_code)
    clock = Clock(ranks.broadcast(Clock(began.time if began else None).time))
    steady(tokenizer, clock)
    how = prompt_format(config)
    world = load_environment(config.environment.kind, config, tokenizer)
    if world is None:
        prompts, dropped = load_prompts(config.prompts, tokenizer, how)
        suites = load_suites(config.eval.suite, tokenizer, how, config.eval.limit)
        evaluator = Evaluator(suites, config.eval, config.rollout.max_new_tokens, tokenizer)
    else:
        prompts, dropped, evaluator = world.prompts, world.dropped, world.evaluator
    suites = {f"eval.suite {suite.name}": suite.problems for suite in evaluator.suites}
    now = Began.of({"prompts": prompts, **suites}, clock)
    if began is not None:
        began.check(now, config)
    unanswered = [prompt.id for prompt in prompts if prompt.answer is None]
    if config.loss.reward_beta and world is None and unanswered:
        raise UserError(
            f"--loss.reward_beta {config.loss.reward_beta}: prompt {unanswered[0]} of {config.prompts} has no answer "
            "to be rewarded for; give answers, or 0"
        )

    device = local_device(config.engine.device)
    student = load_student(config, student_path, device)
    teacher, teacher_model, context = build_teacher(config, ranks, device)
    vocab_size = shared_vocabulary(tokenizer, teacher_tokenizer, student, teacher_model)
    engine = build_engine(config, ranks, student, device)
    r = config.rollout
    rollout = build_rollout(config, student_path, tokenizer, engine)
    teacher_rollout: RolloutEngine | None = None
    if isinstance(teacher, LocalTeacher):
        model, batch = teacher_model.model, config.eval.generate_batch
        teacher_rollout = HFRollout(model, tokenizer, batch, context, ranks)
        if world is not None:
            teacher_rollout = world.episodes(teacher_rollout, model, batch, context, ranks)
    if world is not None:
        rollout = world.episodes(rollout, student.model, r.generate_batch, engine.sampling, ranks)
    return Parts(
        ranks=ranks,
        began=now,
        tokenizer=tokenizer,
        prompts=PromptStream(prompts, config.prompts_per_step, config.seed),
        dropped_prompts=dropped,
        sampler=rollout,
        sampling=Sampling(r.temperature, r.top_p, r.top_k, r.max_new_tokens),
        teacher=teacher,
        teacher_sampler=teacher_rollout,
        selector=selector,
        vocab_size=vocab_size,
        engine=engine,
        evaluator=evaluator,
        telemetry=load_telemetry(config.telemetry.options) if config.telemetry.every else [],
    )


def load_student(config: TrainConfig, path: str, device: torch.device) -> Scorer:
    """The student of `path`: config.student, or a checkpoint of this run.

    Under LoRA a checkpoint's own weights are merged ones; training goes on with the base and the adapters.
    """
    # As DeepSpeedEngine will have it: what is checked here must be what is used.
    packed = config.engine.kind == "deepspeed" and config.engine.zero_stage == 3

    compute = getattr(torch, config.engine.dtype)

    def load(folder: str) -> Scorer:
        return load_scorer(folder, "--student", torch.float32, device, config.trust_remote_code, packed, compute)

    if not config.lora.rank:
        return load(path)
    student = load(config.student)
    add_adapters(student.model, config.lora, config.seed, config.student)
    if path != config.student:
        load_adapters(student.model, Path(path) / ADAPTER_FOLDER)
    return student


def check_rollout(rollout: RolloutConfig) -> None:
    """Raises UserError where the sampler that is named cannot run here: before minutes are spent on loading."""
    if rollout.engine != "hf":
        if importlib.util.find_spec("vllm") is None:
            raise UserError(f"--rollout.engine {rollout.engine}: vLLM is not installed; run `make setup`, or give hf")
        if world_size() % rollout.tensor_parallel:
            raise UserError(
                f"--rollout.tensor_parallel {rollout.tensor_parallel} does not divide the {world_size()} processes; "
                "give a number that does"
            )


def check_adapters(lora: LoraConfig) -> None:
    """Raises UserError where adapters are asked for and peft is not installed."""
    if lora.rank and importlib.util.find_spec("peft") is None:
        raise UserError(f"--lora.rank {lora.rank}: peft is not installed; run `make setup`, or give 0")


def build_teacher(config: TrainConfig, ranks: Ranks, device: torch.device) -> tuple[Teacher, Any, Any]:
    """The teacher that `config` names, what holds its head, and the context within which a local one generates."""
    t, dtype = config.teacher, getattr(torch, config.engine.dtype)
    if t.shard:
        from opsd.teacher.sharded import ShardedTeacher

        sharded = ShardedTeacher(t.model, dtype, device, t.offload, t.cache, config.trust_remote_code)
        return sharded, as_model(sharded.head()), nullcontext
    if t.kind == "local":
        scorer = load_scorer(t.model, "--teacher", dtype, device, config.trust_remote_code)
        local = LocalTeacher(scorer, device, t.offload, t.cache)
        return local, scorer, local.present
    from opsd.teacher.vllm import VLLMTeacher, read_head

    head_VE = read_head(t.model, dtype)
    served = VLLMTeacher(t, head_VE, device, ranks.rank)
    served.connect()
    return served, as_model(head_VE), nullcontext


def as_model(head_VE: Tensor) -> Any:
    """A head where a model's is looked for."""
    return SimpleNamespace(head=SimpleNamespace(weight=head_VE))


def build_rollout(config: TrainConfig, path: str, tokenizer: Any, engine: Engine) -> RolloutEngine:
    """The sampler that `config` names; path: a folder with the plain weights of the engine's student."""
    r = config.rollout
    if r.engine == "hf":
        return HFRollout(engine.student.model, tokenizer, r.generate_batch, engine.sampling, engine.ranks)
    longest = r.max_prompt_tokens + max(r.max_new_tokens, config.eval.max_new_tokens or 0)
    if r.engine == "vllm_process":
        from opsd.rollout.vllm_process import VLLMProcessRollout

        return VLLMProcessRollout(path, tokenizer, engine, r, config.engine, longest, config.trust_remote_code)
    from opsd.rollout.vllm import VLLMRollout

    return VLLMRollout(path, tokenizer, engine, r, config.engine, longest, config.trust_remote_code)


def build_selector(select: SelectConfig) -> TokenSelector | None:
    """The selector of the settings; it is handed those that differ from their defaults, and always the retention."""
    if select.by == ALL_TOKENS:
        return None
    defaults = SelectConfig()
    changed = {
        name: getattr(select, name)
        for name in ("normalise_over", "clip_quantile")
        if getattr(select, name) != getattr(defaults, name)
    }
    return load_selector(select.by, retention=select.retention, **changed, **select.options)


def prompt_format(config: TrainConfig) -> PromptFormat:
    """How records of training and evaluation files become token ids."""
    return PromptFormat(
        kind=config.prompt_format,
        thinking=config.thinking,
        prompt_field=config.prompt_field,
        answer_field=config.answer_field,
        max_tokens=config.rollout.max_prompt_tokens,
        overlong=config.rollout.overlong_prompts,
    )
