"""What both models are asked: prompts, the teacher's own texts, and how far the run reaches."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from opsd.config import TrainConfig
from opsd.data.context import TeacherContext, TeacherPrompts
from opsd.data.prompts import checked_route, load_prompts, routed
from opsd.data.rendering import PromptFormat
from opsd.environments import load_environment
from opsd.eval.evaluator import Evaluator, load_suites
from opsd.model.checks import Reach
from opsd.model.positions import Span
from opsd.types import Prompt
from opsd.utils.errors import UserError


class Asked(NamedTuple):
    """What a run asks. world: its environment, if any. dropped, unfit: number of prompts that were too long for the
    student and for the teacher. asking: how the teacher is asked; None: as the student is."""

    world: Any
    prompts: list[Any]
    dropped: int
    unfit: int
    evaluator: Any
    asking: TeacherPrompts | None


def ask(config: TrainConfig, tokenizer: Any, teacher_tokenizer: Any) -> Asked:
    """Prompts and suites, rendered by the student's tokenizer; if the teacher has its own prompts, also by its own."""
    how = prompt_format(config)
    asking = teacher_prompts(config, teacher_tokenizer, how)
    world = load_environment(config.environment.kind, config, tokenizer)
    if world is None:
        more = None if asking is None else asking.of_record
        more = routed(config.teacher_field, config.teacher_paths()) if config.teachers else more
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
    """Raises UserError if a prompt has no answer and the run needs rewards."""
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


def routed_episodes(config: TrainConfig, prompts: list[Any], world: Any) -> list[Any]:
    """An environment's prompts, each with the name of its teacher."""
    field, names = config.teacher_field, config.teacher_paths()
    return [
        dataclasses.replace(
            prompt, teacher=checked_route(world.column(prompt, field), field, names, f"task {prompt.id}")
        )
        for prompt in prompts
    ]


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


def prompt_format(config: TrainConfig) -> PromptFormat:
    """How records of training and evaluation files become token ids."""
    r = config.rollout
    return PromptFormat.of(config, max_tokens=r.max_prompt_tokens, overlong=r.overlong_prompts)
