"""Rollouts of several turns: the student writes, an environment answers, until the student makes no more calls.

A response holds the student's tokens as they were sampled and the environment's tokens between them, in one sequence;
`student_mask` tells them apart, and only the student's are ever scored, selected or trained on.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Protocol

from opsd.rollout.base import RolloutEngine
from opsd.types import Prompt, Rollout, Sampling
from opsd.utils.seeding import derive_seed


class Conversation(Protocol):
    """The environment's side."""

    def reply(self, prompt: Prompt, turn_ids: list[int]) -> list[int] | None:
        """The tokens that follow a turn of the student; None where the turn ends the episode. Never raises."""
        ...


@dataclass
class Episode:
    """One episode as it grows. limit: most response tokens, the environment's included. turns: those still allowed."""

    id: int
    prompt: Prompt
    limit: int
    turns: int
    ids: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    done: bool = False
    truncated: bool = False

    @property
    def room(self) -> int:
        """Response tokens that may still come."""
        return self.limit - len(self.ids)

    def take(self, turn_ids: list[int], cut: bool, conversation: Conversation) -> list[int]:
        """Add a turn of the student, and the answer to it, which is returned ([] at the end of the episode).

        cut: the turn did not end by itself. An episode that ends before its last turn is truncated: it was cut, has
        no turn left, or its next answer would leave the student no room.
        """
        cut = cut or len(turn_ids) > self.room
        self._add(turn_ids[: self.room], by_student=True)
        self.turns -= 1
        reply = None if cut else conversation.reply(self.prompt, turn_ids)
        if reply is None or not self.turns or len(reply) >= self.room:
            self.done, self.truncated = True, cut or reply is not None
            return []
        self._add(reply, by_student=False)
        return reply

    def rollout(self) -> Rollout:
        """The finished episode."""
        return Rollout(self.id, self.prompt, self.ids, self.truncated, self.mask)

    def _add(self, ids: list[int], by_student: bool) -> None:
        self.ids += ids
        self.mask += [by_student] * len(ids)


class AgentRollout(RolloutEngine):
    """Rollouts that are episodes, turn by turn over any other engine (transformers or vLLM).

    All unfinished episodes are in each batch, so that the engine stays full. sampling.max_new_tokens is the length of a
    whole response. Every rank plays the same episodes: the engine shares out the work.
    """

    def __init__(self, engine: RolloutEngine, conversation: Conversation, max_turns: int) -> None:
        self._engine, self._conversation, self._max_turns = engine, conversation, max_turns

    def generate(self, prompts: list[Prompt], samples: int, sampling: Sampling, seed: int) -> list[Rollout]:
        """RolloutEngine's. Draws depend on seed, turn, and place among the unfinished episodes."""
        limit = sampling.max_new_tokens
        episodes = [
            Episode(number, prompt, limit, self._max_turns)
            for number, prompt in enumerate(prompt for prompt in prompts for _ in range(samples))
        ]
        turn = 0
        while playing := [episode for episode in episodes if not episode.done]:
            turn += 1
            asked = [Prompt(e.prompt.id, e.prompt.text, e.prompt.ids + e.ids, None) for e in playing]
            room = dataclasses.replace(sampling, max_new_tokens=max(episode.room for episode in playing))
            written = self._engine.generate(asked, 1, room, derive_seed(seed, "turn", turn))
            for episode, rollout in zip(playing, written, strict=True):
                episode.take(rollout.response_ids, rollout.truncated, self._conversation)
        return [episode.rollout() for episode in episodes]

    def sync(self) -> None:
        self._engine.sync()
