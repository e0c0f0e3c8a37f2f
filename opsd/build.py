"""Everything a run is made of, loaded and checked before anything is written."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from opsd.config import LoraConfig, RolloutConfig, SelectConfig, TrainConfig
from opsd.config.settings import MOST
from opsd.data.context import TeacherContext, TeacherPrompts
from opsd.data.packing import empty
from opsd.data.prompts import PromptFormat, PromptStream, checked_route, hidden_messages, load_prompts, routed
from opsd.data.template import Clock, steady
from opsd.distill.inputs import can_join
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
from opsd.model.stops import PairStops, eos_token_ids, generation_of, reconcile, stated_stops, turn_ends
from opsd.model.vocabulary import check_ids, check_tokenizers, shared_vocabulary
from opsd.rollout import HFRollout, RolloutEngine
from opsd.run.began import Began
from opsd.run.tracking import check_wandb
from opsd.selection import ALL_TOKENS, TokenSelector, TokenTelemetry, load_selector, load_telemetry, selector_takes
from opsd.teacher import LocalTeacher, RoutedTeacher, SelfTeacher, Teacher
from opsd.types import NO_STOPS, Head, Prompt, Sampling, Stops
from opsd.utils.distributed import Ranks, local_device, world_size
from opsd.utils.errors import UserError
from opsd.utils.oom import memory_for


@dataclass(frozen=True)
class Parts:
    """The parts of a run, in the order a step uses them. dropped_prompts: over-long ones that were left out.

    source: the folder that the student was loaded from. notes: what to tell at the start, a line each. asking: how the
    teacher is asked, where that is not as the student is.
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
    stops: Stops = NO_STOPS
    source: Path | None = None
    notes: Sequence[str] = ()
    asking: TeacherPrompts | None = None

    def models(self) -> Models:
        """What an evaluation reads of them."""
        how = (self.ranks, self.engine.device, self.stops)
        return Models(self.evaluator, self.sampler, self.teacher_sampler, *how)


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
    tokenizers = load_teacher_tokenizers(config, tokenizer)
    telemetry = load_telemetry(config.telemetry.options) if config.telemetry.every else []
    clock = Clock(ranks.broadcast(Clock(began.time if began else None).time))
    steady(tokenizer, clock)
    for each in tokenizers:
        steady(each, clock)
    asked = ask(config, tokenizer, tokenizers[0])
    prompts, evaluator, world, asking = asked.prompts, asked.evaluator, asked.world, asked.asking
    suites = {f"eval.suite {suite.name}": suite.problems for suite in evaluator.suites}
    now = Began.of({"prompts": prompts, **suites}, clock, read_folders(config, checkpoint))
    if began is not None:
        began.check(now, config)
    check_answers(config, prompts, asking)

    device, r = local_device(config.engine.device), config.rollout
    problems = [problem for suite in evaluator.suites for problem in suite.problems]
    reach = reach_of(config, prompts, problems)
    shorter = {"shorter": "give a smaller --teacher.max_prompt_tokens"}
    farther = [] if asking is None else [Span(asking.longest(prompts), r.max_new_tokens, **shorter)]
    teacher_reach = dataclasses.replace(reach, spans=(*reach.spans, *farther))
    own = lies_in_student(config)
    if ranks.is_main and config.track.progress:
        for line in opening(config, ranks.world_size, max(len(prompt.ids) for prompt in prompts)):
            print(line, file=sys.stderr, flush=True)
    student = load_student(config, student_path, device, teacher_reach if own else reach)
    notes = check_student(config, student, tokenizer, student_path)
    if asked.unfit:
        left_out = "prompts dropped, longer than --teacher.max_prompt_tokens in the teacher's form"
        notes.append(f"{left_out}: {asked.unfit}")
    longer = length_switches(student.model, reach.longest) if student.alone else frozenset[int]()
    built = {} if own else build_teachers(config, ranks, device, teacher_reach)
    # Of a teacher that gives log-probabilities no head is known; its tokenizer says what it can give.
    heads = [model or student for _, model, _ in built.values()] or [student]
    vocab_size = min(
        shared_vocabulary(tokenizer, its, student, head) for its, head in zip(tokenizers, heads, strict=True)
    )
    check_ids(prompts, vocab_size, config.prompts)
    check_ids(problems, vocab_size, "--eval.suite")
    its_heads = [each.head_for(empty(name)) for name, (each, _, _) in built.items()]
    joinable = None not in its_heads and can_join(student.head.as_head(), *filter(None, its_heads))
    goes_on = began or (None if checkpoint is None else Began({}))
    pair, told = settle_stops(config, student, tokenizer, tokenizers, vocab_size, joinable, goes_on)
    ends = pair.stops.ids
    evaluator.ends = frozenset(ends)
    if world is None and config.prompt_format == "chat":
        told += hidden_messages(config.prompts, tokenizer, prompt_format(config))
    if world is None and config.prompt_format == "chat" and asking is None:
        for its in tokenizers:
            told += compare_templates(prompts, config.prompts, tokenizer, its, prompt_format(config), clock)
    engine = build_engine(config, ranks, student, device)
    teacher, teacher_model, context = built.get("", (None, student, nullcontext))
    if teacher is None:
        routed_to = {name: each for name, (each, _, _) in built.items()}
        teacher = SelfTeacher(engine, config.teacher) if own else RoutedTeacher(routed_to)
    rollout = build_rollout(config, student_path, tokenizer, engine, vocab_size, reach.longest, longer, ends)
    if isinstance(rollout, HFRollout) and rollout.switches and world is not None:
        raise UserError(f"--student {student_path}: batching changes its outputs; an environment cannot use it")
    teacher_rollout: RolloutEngine | None = None
    if isinstance(teacher, LocalTeacher):
        model, batch = teacher_model.model, config.eval.generate_batch
        with context():
            switches = length_switches(model, reach.longest) if teacher_model.alone else frozenset[int]()
        teacher_rollout = HFRollout(model, tokenizer, batch, context, ranks, vocab_size, switches, ends)
        if world is not None:
            teacher_rollout = world.episodes(teacher_rollout, model, batch, context, ranks, vocab_size, ends)
    if world is not None:
        rollout = world.episodes(rollout, student.model, r.generate_batch, engine.sampling, ranks, vocab_size, ends)
    return Parts(
        ranks=ranks,
        began=dataclasses.replace(now, stops=pair),
        tokenizer=tokenizer,
        prompts=PromptStream(prompts, config.prompts_per_step, config.seed),
        dropped_prompts=asked.dropped,
        sampler=rollout,
        sampling=Sampling(r.temperature, r.top_p, r.top_k, r.max_new_tokens),
        teacher=teacher,
        teacher_sampler=teacher_rollout,
        selector=selector,
        vocab_size=vocab_size,
        stops=pair.stops,
        engine=engine,
        evaluator=evaluator,
        telemetry=telemetry,
        source=Path(student_path),
        notes=[*told, *notes],
        asking=asking,
    )


class Asked(NamedTuple):
    """What a run asks. world: its environment, if any. dropped, unfit: prompts that were too long for the student, for
    the teacher. asking: how the teacher is asked, where that is not as the student is."""

    world: Any
    prompts: list[Any]
    dropped: int
    unfit: int
    evaluator: Any
    asking: TeacherPrompts | None


def ask(config: TrainConfig, tokenizer: Any, teacher_tokenizer: Any) -> Asked:
    """Prompts and suites, rendered by the student's tokenizer and, where it is asked otherwise, by the teacher's."""
    how = prompt_format(config)
    asking = teacher_prompts(config, teacher_tokenizer, how)
    world = load_environment(config.environment.kind, config, tokenizer)
    if world is None:
        more = routed(config.teacher_field, config.teacher_paths()) if config.teachers else asking and asking.of_record
        prompts, dropped = load_prompts(config.prompts, tokenizer, how, more)
        suites = load_suites(config.eval.suite, tokenizer, how, config.eval.limit)
        evaluator = Evaluator(suites, config.eval, config.rollout.max_new_tokens, tokenizer)
    else:
        prompts, dropped, evaluator = world.prompts, world.dropped, world.evaluator
        prompts = prompts if asking is None else asking.of_episodes(prompts, world)
        prompts = routed_episodes(config, prompts, world) if config.teachers else prompts
    prompts, unfit = (prompts, 0) if asking is None else asking.fitting(prompts)
    return Asked(world, prompts, dropped, unfit, evaluator, asking)


def teacher_prompts(config: TrainConfig, tokenizer: Any, how: PromptFormat) -> TeacherPrompts | None:
    """How the teacher is asked by --teacher.context; None: as the student is. tokenizer: the teacher's."""
    teacher = config.teacher
    if teacher.context is None:
        return None
    context, samples = TeacherContext.read(teacher.context), config.rollout.samples_per_prompt
    if context.takes_sample and samples < 2:
        raise UserError(
            f"--teacher.context {teacher.context} has {{rollout}}, another sample of the same prompt: give "
            f"--rollout.samples_per_prompt 2 or more, not {samples}"
        )
    return TeacherPrompts(context, tokenizer, how, teacher.max_prompt_tokens)


def check_answers(config: TrainConfig, prompts: list[Prompt], asking: TeacherPrompts | None) -> None:
    """Raises UserError where a prompt has no answer and the run goes by rewards."""
    missing = next((prompt.id for prompt in prompts if prompt.answer is None), None)
    if missing is None or config.environment.kind != "none":
        return
    none = f"prompt {missing} of {config.prompts} has no gold answer, so it cannot be rewarded; give answers"
    if config.loss.reward_beta:
        raise UserError(f"--loss.reward_beta {config.loss.reward_beta}: {none}, or 0")
    if config.loss.prompt_weights != "none":
        raise UserError(f"--loss.prompt_weights {config.loss.prompt_weights}: {none}, or none")
    if asking is not None and asking.context.takes_sample:
        raise UserError(f"--teacher.context {config.teacher.context} has {{rollout}}: {none}, or another context")


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


def settle_stops(
    config: TrainConfig,
    student: Scorer,
    tokenizer: Any,
    tokenizers: list[Any],
    vocab_size: int,
    joinable: bool,
    began: Began | None = None,
) -> tuple[PairStops, list[str]]:
    """What ends the rollouts of this pair, and what to tell, a line each; a run that goes on keeps what it began with.

    tokenizers: the teachers'. joinable: whether the loss can take several stops for one.
    Where that is more than the student's own folder names, its checkpoints name it: whatever samples from them stops.
    Raises UserError for stops that cannot be reconciled.
    """
    own, beyond = eos_token_ids(student.model.generation_config, tokenizer), set[int]()
    if began is not None:
        # A folder of an earlier version: its rollouts end where the student does.
        pair = began.stops or PairStops(own, own, Stops(tuple(own)))
    else:
        chat, trust = config.prompt_format == "chat", config.trust_remote_code
        stated = stated_stops(config.rollout.stop_tokens, tokenizer, vocab_size, "--rollout.stop_tokens")
        ours = turn_ends(student.model.generation_config, tokenizer, chat)
        teachers = zip(config.teacher_paths().values(), tokenizers, strict=True)
        theirs = [turn_ends(generation_of(path, trust), its, chat) for path, its in teachers]
        beyond = {token for ends in (ours, *theirs) for token in ends if token >= vocab_size}
        pair, *others = [reconcile(ours, ends, stated, vocab_size, joinable) for ends in theirs]
        if any(other.stops != pair.stops for other in others):
            raise UserError("--teachers: their turns end with different tokens; give --rollout.stop_tokens")
    if not set(pair.stops.ids) <= set(own) and student.model.generation_config is not None:
        student.model.generation_config.eos_token_id = list(pair.stops.ids)
    told = [f"end tokens that are not in the shared vocabulary, ignored: {sorted(beyond)}"] if beyond else []
    return pair, [*told, pair.line(tokenizer)]


def compare_templates(
    prompts: list[Prompt], path: str, tokenizer: Any, teacher_tokenizer: Any, how: PromptFormat, clock: Clock
) -> list[str]:
    """A line where the teacher's chat template would ask the prompts otherwise than the student's, which asks both."""
    if (tokenizer.chat_template, tokenizer.special_tokens_map) == (
        teacher_tokenizer.chat_template,
        teacher_tokenizer.special_tokens_map,
    ):
        return []
    steady(teacher_tokenizer, Clock(clock.time))
    ours = {prompt.id: prompt.ids for prompt in prompts}
    try:
        asked, _ = load_prompts(path, teacher_tokenizer, dataclasses.replace(how, max_tokens=MOST))
    except UserError as problem:
        return [f"the teacher's chat template cannot render these prompts ({problem}); both models use the student's"]
    others = [prompt for prompt in asked if prompt.id in ours and prompt.ids != ours[prompt.id]]
    if not others:
        return []
    first = others[0]
    written, own = (tokenizer.decode(ids[-40:]) for ids in (first.ids, ours[first.id]))
    return [
        f"chat templates differ on {len(others)} of {len(ours)} prompts, both models use the student's: "
        f"prompt {first.id} ends with {own!r}, the teacher's own would end with {written!r}; if the "
        "teacher needs its own, put its template into the student's folder"
    ]


def check_student(config: TrainConfig, student: Scorer, tokenizer: Any, path: str) -> list[str]:
    """What would fail later fails now: saving, and vLLM's taking of the weights. Returns what to tell, a line each.

    Raises UserError.
    """
    model = student.model
    notes = make_savable(model, tokenizer, path, "--student")
    if student.alone and config.environment.kind != "none":
        raise UserError(f"--student {path}: batching changes its outputs; an environment cannot use it")
    if student.alone and config.rollout.engine != "hf":
        raise UserError(
            f"--student {path}: its outputs change with sequence length, but not in vLLM; give --rollout.engine hf"
        )
    if student.alone:
        notes.append("the student's sequences are computed one by one, because batching changes its outputs")
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


def read_folders(config: TrainConfig, checkpoint: Path | None) -> dict[str, str]:
    """The models that a run's weights are read from, by flag; what a checkpoint holds is not read there again."""
    anew = checkpoint is None
    student = {"--student": config.student} if anew or config.lora.rank else {}
    teachers = config.teacher_paths() if anew or not config.teacher.follows else {}
    return student | {f"--teachers {name}" if name else "--teacher": path for name, path in teachers.items()}


def load_teacher_tokenizers(config: TrainConfig, tokenizer: Any) -> list[Any]:
    """Each teacher's own. Raises UserError where one maps other tokens than the student's, `tokenizer`."""
    found = []
    for name, path in config.teacher_paths().items():
        found.append(load_tokenizer(path, f"--teachers {name}" if name else "--teacher", config.trust_remote_code))
        check_tokenizers(tokenizer, found[-1])
    return found


def routed_episodes(config: TrainConfig, prompts: list[Any], world: Any) -> list[Any]:
    """An environment's prompts, each with the name of its teacher."""
    field, names = config.teacher_field, config.teacher_paths()
    return [
        dataclasses.replace(
            prompt, teacher=checked_route(world.column(prompt, field), field, names, f"task {prompt.id}")
        )
        for prompt in prompts
    ]


def build_teachers(
    config: TrainConfig, ranks: Ranks, device: torch.device, reach: Reach
) -> dict[str, tuple[Teacher, Any, Any]]:
    """Each teacher by name, as `build_teacher` gives it."""
    return {name: build_teacher(config, ranks, device, reach, name) for name in config.teacher_paths()}


def build_teacher(
    config: TrainConfig, ranks: Ranks, device: torch.device, reach: Reach | None = None, name: str = ""
) -> tuple[Teacher, Any, Any]:
    """The teacher that `config` names, what holds its head, and the context within which a local one generates.

    name: which one of several.
    """
    t, dtype = config.teacher_of(name), getattr(torch, settled(config.engine, device).dtype)
    if t.shard:
        from opsd.teacher.sharded import ShardedTeacher

        sharded = ShardedTeacher(t.model, dtype, device, t.offload, t.cache, config.trust_remote_code, reach)
        return sharded, as_model(sharded.head()), nullcontext
    if t.kind == "local":
        scorer = load_scorer(t.model, "--teacher", dtype, device, config.trust_remote_code, reach=reach)
        local = LocalTeacher(scorer, device, t.offload, t.cache)
        return local, scorer, local.present
    if t.kind == "logprobs":
        from opsd.teacher.logprobs import LogprobsTeacher

        logprobs = LogprobsTeacher(t, device, ranks.rank)
        logprobs.connect(reach.longest if reach else 0)
        return logprobs, None, nullcontext
    from opsd.teacher.vllm import VLLMTeacher, read_head

    head = read_head(t.model, dtype, config.trust_remote_code, reach)
    served = VLLMTeacher(t, head, device, ranks.rank)
    served.connect(reach.longest if reach else 0)
    return served, as_model(head), nullcontext


def lies_in_student(config: TrainConfig) -> bool:
    """Whether the teacher is the student's own model at other weights, not a model of its own."""
    t = config.teacher
    here = t.kind == "local" and not t.shard and not t.offload
    return t.follows or (t.is_student and config.lora.rank > 0 and here)


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
    ends: Sequence[int] | None = None,
) -> RolloutEngine:
    """The sampler that `config` names; path: a folder with the plain weights of the engine's student.

    vocab_size: only ids below it are sampled. longest: tokens of the longest sequence. switches: see `decode`.
    ends: the tokens that end a response; None: the student's own.
    """
    r = config.rollout
    if r.engine == "hf":
        how = (r.generate_batch, engine.sampling, engine.ranks, vocab_size, switches, ends)
        return HFRollout(engine.student.model, tokenizer, *how)
    how = (config.engine, longest, config.trust_remote_code, vocab_size, ends)
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
