"""Everything a run is made of, loaded and checked before anything is written."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from opsd.config import LoraConfig, RolloutConfig, SelectConfig, TrainConfig
from opsd.data.prompts import PromptFormat, PromptStream, load_prompts
from opsd.data.template import Clock, steady
from opsd.engine import Engine, build_engine, settled
from opsd.environments import load_environment
from opsd.estimate.opening import opening
from opsd.eval.cache import Models
from opsd.eval.evaluator import Evaluator, load_suites
from opsd.model.checks import Reach, Span, length_switches
from opsd.model.files import check_sampled, make_savable
from opsd.model.loading import load_scorer, load_tokenizer
from opsd.model.lora import ADAPTER_FOLDER, add_adapters, coverage, load_adapters
from opsd.model.scorer import Scorer
from opsd.model.vocabulary import check_ends, check_ids, check_tokenizers, shared_vocabulary
from opsd.rollout import HFRollout, RolloutEngine
from opsd.rollout.hf import eos_token_ids
from opsd.run.began import Began
from opsd.run.tracking import check_wandb
from opsd.selection import ALL_TOKENS, TokenSelector, TokenTelemetry, load_selector, load_telemetry, selector_takes
from opsd.teacher import LocalTeacher, Teacher
from opsd.types import Head, Prompt, Sampling
from opsd.utils.distributed import Ranks, local_device, world_size
from opsd.utils.errors import UserError
from opsd.utils.oom import memory_for


@dataclass(frozen=True)
class Parts:
    """The parts of a run, in the order a step uses them. dropped_prompts: over-long ones that were left out.

    source: the folder that the student was loaded from. notes: what to tell at the start, a line each.
    """

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
    source: Path | None = None
    notes: Sequence[str] = ()

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
    check_tokenizers(tokenizer, teacher_tokenizer)
    telemetry = load_telemetry(config.telemetry.options) if config.telemetry.every else []
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
    if config.loss.reads_rewards and world is None and unanswered:
        raise UserError(
            f"--loss.reward_beta {config.loss.reward_beta}, --loss.prompt_weights {config.loss.prompt_weights}: prompt "
            f"{unanswered[0]} of {config.prompts} has no answer to be rewarded for; give answers, or 0 and none"
        )

    device, r = local_device(config.engine.device), config.rollout
    problems = [problem for suite in evaluator.suites for problem in suite.problems]
    reach = reach_of(config, prompts, problems)
    if ranks.is_main and config.track.progress:
        for line in opening(config, ranks.world_size, max(len(prompt.ids) for prompt in prompts)):
            print(line, file=sys.stderr, flush=True)
    student = load_student(config, student_path, device, reach)
    notes = check_student(config, student, tokenizer, student_path)
    longer = length_switches(student.model, reach.longest) if student.alone else frozenset[int]()
    teacher, teacher_model, context = build_teacher(config, ranks, device, reach)
    vocab_size = shared_vocabulary(tokenizer, teacher_tokenizer, student, teacher_model)
    check_ids(prompts, vocab_size, config.prompts)
    check_ids(problems, vocab_size, "--eval.suite")
    check_ends(eos_token_ids(student.model.generation_config, tokenizer), vocab_size, f"--student {student_path}")
    engine = build_engine(config, ranks, student, device)
    rollout = build_rollout(config, student_path, tokenizer, engine, vocab_size, reach.longest, longer)
    teacher_rollout: RolloutEngine | None = None
    if isinstance(teacher, LocalTeacher):
        model, batch = teacher_model.model, config.eval.generate_batch
        with context():
            switches = length_switches(model, reach.longest) if teacher_model.alone else frozenset[int]()
        teacher_rollout = HFRollout(model, tokenizer, batch, context, ranks, vocab_size, switches)
        if world is not None:
            teacher_rollout = world.episodes(teacher_rollout, model, batch, context, ranks, vocab_size)
    if world is not None:
        rollout = world.episodes(rollout, student.model, r.generate_batch, engine.sampling, ranks, vocab_size)
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
        telemetry=telemetry,
        source=Path(student_path),
        notes=notes,
    )


def reach_of(config: TrainConfig, prompts: list[Prompt], problems: list[Prompt]) -> Reach:
    """How far a run goes: its longest sequences in training and in evaluation, and its packed rows."""

    def longest(asked: list[Prompt]) -> int:
        return max(len(prompt.ids) for prompt in asked)

    spans = [Span(longest(prompts), config.rollout.max_new_tokens)]
    if problems:
        own = config.eval.max_new_tokens
        flag = "--eval.max_new_tokens" if own else "--rollout.max_new_tokens"
        spans.append(Span(longest(problems), own or config.rollout.max_new_tokens, flag))
    return Reach(tuple(spans), config.engine.micro_batch_tokens)


def check_student(config: TrainConfig, student: Scorer, tokenizer: Any, path: str) -> list[str]:
    """What would fail later fails now: saving, and vLLM's taking of the weights. Returns what to tell, a line each.

    Raises UserError.
    """
    model = student.model
    notes = make_savable(model, tokenizer, path, "--student")
    if student.alone and config.environment.kind != "none":
        raise UserError(f"--student {path}: sequences beside each other change it; an environment cannot use it")
    if student.alone and config.rollout.engine != "hf":
        raise UserError(
            f"--student {path}: it changes with a sequence's length, not so in vLLM; give --rollout.engine hf"
        )
    if student.alone:
        notes.append("the student's sequences are computed one by one: beside others they would be changed")
    if config.rollout.engine != "hf":
        check_sampled(model, path, "--student")
    if config.lora.rank:
        notes.append(coverage(model))
    return notes


def load_student(config: TrainConfig, path: str, device: torch.device, reach: Reach | None = None) -> Scorer:
    """The student of `path`: config.student, or a checkpoint of this run.

    Under LoRA a checkpoint's own weights are merged ones; training goes on with the base and the adapters.
    """
    # As DeepSpeedEngine will have it: what is checked here must be what is used.
    packed = config.engine.kind == "deepspeed" and config.engine.zero_stage == 3

    compute = getattr(torch, settled(config.engine, device).dtype)

    def load(folder: str) -> Scorer:
        trust = config.trust_remote_code
        return load_scorer(folder, "--student", torch.float32, device, trust, packed, compute, reach)

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


def build_teacher(
    config: TrainConfig, ranks: Ranks, device: torch.device, reach: Reach | None = None
) -> tuple[Teacher, Any, Any]:
    """The teacher that `config` names, what holds its head, and the context within which a local one generates."""
    t, dtype = config.teacher, getattr(torch, settled(config.engine, device).dtype)
    if t.shard:
        from opsd.teacher.sharded import ShardedTeacher

        sharded = ShardedTeacher(t.model, dtype, device, t.offload, t.cache, config.trust_remote_code, reach)
        return sharded, as_model(sharded.head()), nullcontext
    if t.kind == "local":
        scorer = load_scorer(t.model, "--teacher", dtype, device, config.trust_remote_code, reach=reach)
        local = LocalTeacher(scorer, device, t.offload, t.cache)
        return local, scorer, local.present
    from opsd.teacher.vllm import VLLMTeacher, read_head

    head = read_head(t.model, dtype, config.trust_remote_code, reach)
    served = VLLMTeacher(t, head, device, ranks.rank)
    served.connect(reach.longest if reach else 0)
    return served, as_model(head), nullcontext


def as_model(head: Head) -> Any:
    """A head where a model's is looked for."""
    return SimpleNamespace(head=SimpleNamespace(weight=head.weight_VD))


def build_rollout(
    config: TrainConfig,
    path: str,
    tokenizer: Any,
    engine: Engine,
    vocab_size: int,
    longest: int,
    switches: frozenset[int] = frozenset(),
) -> RolloutEngine:
    """The sampler that `config` names; path: a folder with the plain weights of the engine's student.

    vocab_size: only ids below it are sampled. longest: tokens of the longest sequence. switches: see `decode`.
    """
    r = config.rollout
    if r.engine == "hf":
        how = (r.generate_batch, engine.sampling, engine.ranks, vocab_size, switches)
        return HFRollout(engine.student.model, tokenizer, *how)
    how = (config.engine, longest, config.trust_remote_code, vocab_size)
    if r.engine == "vllm_process":
        from opsd.rollout.vllm_process import VLLMProcessRollout

        return VLLMProcessRollout(path, tokenizer, engine, r, *how)
    from opsd.rollout.vllm import VLLMRollout

    return VLLMRollout(path, tokenizer, engine, r, *how)


def build_selector(select: SelectConfig) -> TokenSelector | None:
    """The selector of the settings; it is handed its retention, and what its own defaults may not say."""
    if select.by == ALL_TOKENS:
        return None
    defaults = SelectConfig()
    options: dict[str, Any] = {"retention": select.retention}
    if select.clip_quantile != defaults.clip_quantile:
        options["clip_quantile"] = select.clip_quantile
    scope = select.normalise_over
    # A rule's own default is micro_batch. batch, the trainer's, is handed only to a rule that has the option.
    if scope != "micro_batch" and (scope != defaults.normalise_over or selector_takes(select.by, "normalise_over")):
        options["normalise_over"] = scope
    return load_selector(select.by, **(options | select.options))


def prompt_format(config: TrainConfig) -> PromptFormat:
    """How records of training and evaluation files become token ids."""
    r = config.rollout
    return PromptFormat.of(config, max_tokens=r.max_prompt_tokens, overlong=r.overlong_prompts)
