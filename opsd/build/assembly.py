"""The parts of a run, put together and checked against each other."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsd.build.asking import ask, check_answers, prompt_format, reach_of
from opsd.build.models import (
    build_teachers,
    check_adapters,
    check_student,
    lies_in_student,
    load_student,
    load_teacher_tokenizers,
    read_folders,
)
from opsd.build.sampler import build_rollout, build_selector, check_rollout
from opsd.build.stops import compare_templates, settle_stops
from opsd.config import TrainConfig
from opsd.data.context import TeacherPrompts
from opsd.data.packing import empty
from opsd.data.prompts import PromptStream, hidden_messages
from opsd.data.template import Clock, steady
from opsd.distill.inputs import can_join
from opsd.engine import Engine, build_engine
from opsd.estimate.opening import opening
from opsd.eval.cache import Models
from opsd.model.checks import length_switches
from opsd.model.loading import load_tokenizer
from opsd.model.positions import Span
from opsd.model.vocabulary import check_ids, shared_vocabulary
from opsd.rollout import HFRollout, RolloutEngine
from opsd.run.began import Began
from opsd.run.tracking import check_trackers
from opsd.selection import TokenSelector, TokenTelemetry, load_telemetry
from opsd.teacher import LocalTeacher, RoutedTeacher, SelfTeacher, Teacher
from opsd.types import NO_STOPS, Stops
from opsd.utils.distributed import Ranks, local_device
from opsd.utils.errors import UserError
from opsd.utils.oom import memory_for


@dataclass(frozen=True)
class Parts:
    """The parts of a run, in the order a step uses them. dropped_prompts: number of prompts dropped as too long.

    source: the folder that the student was loaded from. notes: lines to print at the start. asking: how the teacher is
    asked; None: as the student is.
    """

    ranks: Ranks
    began: Began
    tokenizer: Any
    prompts: PromptStream
    dropped_prompts: int
    sampler: RolloutEngine

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
        """The parts that an evaluation needs."""
        how = (self.ranks, self.engine.device, self.stops)
        return Models(self.evaluator, self.sampler, self.teacher_sampler, *how)


@memory_for("loading", "then start again")
def assemble(config: TrainConfig, ranks: Ranks, checkpoint: Path | None = None, began: Began | None = None) -> Parts:
    """Load what `config` names; the student from `checkpoint` if one is given.

    began: for a resumed run, what it began with; the prompts must be the same.
    Raises UserError for anything that cannot be used. Writes nothing.
    """
    check_trackers(config)
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
    own_head, its_heads = student.head.as_head(), [each.head_for(empty(name)) for name, each in built.items()]
    # A teacher that gives log-probabilities has no known head; its tokenizer says which tokens it knows.
    heads = [head or own_head for head in its_heads] or [own_head]
    vocab_size = min(
        shared_vocabulary(tokenizer, its, own_head, head) for its, head in zip(tokenizers, heads, strict=True)
    )
    check_ids(prompts, vocab_size, config.prompts)
    check_ids(problems, vocab_size, "--eval.suite")
    joinable = None not in its_heads and can_join(*heads, own_head)
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
    teacher = SelfTeacher(engine, config.teacher) if own else built.get("") or RoutedTeacher(built)
    rollout = build_rollout(config, student_path, tokenizer, engine, vocab_size, reach.longest, longer, ends)
    if isinstance(rollout, HFRollout) and rollout.switches and world is not None:
        raise UserError(f"--student {student_path}: batching changes its outputs; an environment cannot use it")
    teacher_rollout: RolloutEngine | None = None
    if isinstance(teacher, LocalTeacher):
        model, context, batch = teacher.scorer.model, teacher.present, config.eval.generate_batch
        with context():
            switches = length_switches(model, reach.longest) if teacher.scorer.alone else frozenset[int]()
        teacher_rollout = HFRollout(model, tokenizer, batch, context, ranks, vocab_size, switches, ends)
        if world is not None:
            teacher_rollout = world.episodes(teacher_rollout)
    if world is not None:
        rollout = world.episodes(rollout)
    return Parts(
        ranks=ranks,
        began=dataclasses.replace(now, stops=pair),
        tokenizer=tokenizer,
        prompts=PromptStream(prompts, config.prompts_per_step, config.seed),
        dropped_prompts=asked.dropped,
        sampler=rollout,
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
