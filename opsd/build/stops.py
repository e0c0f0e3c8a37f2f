"""Which tokens end a turn of this student and teacher, and whether their chat templates agree."""

from __future__ import annotations

import dataclasses
from typing import Any

from opsd.config import TrainConfig
from opsd.config.settings import MOST
from opsd.data.prompts import load_prompts
from opsd.data.rendering import PromptFormat
from opsd.data.template import Clock, steady
from opsd.model.scorer import Scorer
from opsd.model.stops import PairStops, eos_token_ids, generation_of, reconcile, stated_stops, turn_ends
from opsd.run.began import Began
from opsd.types import Prompt, Stops
from opsd.utils.errors import UserError


def settle_stops(
    config: TrainConfig,
    student: Scorer,
    tokenizer: Any,
    tokenizers: list[Any],
    vocab_size: int,
    joinable: bool,
    began: Began | None = None,
) -> tuple[PairStops, list[str]]:
    """What ends the rollouts of this pair, and lines to print; a resumed run keeps what it began with.

    tokenizers: the teachers'. joinable: whether the loss can merge several stops into one.
    If the student's folder does not name them all, its checkpoints do, so that any sampler of a checkpoint stops there.
    Raises UserError for stops that cannot be reconciled.
    """
    own, beyond = eos_token_ids(student.model.generation_config, tokenizer), set[int]()
    if began is not None:
        # A folder of an earlier version has no stops: its rollouts end at the student's own end tokens.
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
    """A warning line if the teacher's chat template renders a prompt differently; both models get the student's."""
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
