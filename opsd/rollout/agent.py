"""Rollouts of several turns: student and environment alternate until the student makes no more calls.

A response has the student's tokens as they were sampled and the environment's tokens between them, in one sequence;
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
        """The tokens that follow a turn of the student; None if the turn ends the episode. Never raises."""
        ...


@dataclass
class Episode:
    """A growing episode. limit: maximum response tokens, including the environment's. turns: those still allowed."""

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
        """Number of response tokens that may still follow."""
        return self.limit - len(self.ids)

    def take(self, turn_ids: list[int], cut: bool, conversation: Conversation) -> list[int]:
        """Add a turn of the student and the environment's reply; returns the reply ([] at the end of the episode).

        cut: the turn did not end by itself. An episode is truncated if a turn was cut, no turn is left for the student
        after a reply, or the reply would leave the student no room.
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
    """Rollouts that are episodes; any other engine (transformers or vLLM) samples the turns.

    Each batch has all unfinished episodes, to keep the engine busy. sampling.max_new_tokens is the maximum length of a
    whole response. Every rank runs the same episodes; the engine divides the sampling among the ranks.
    """

    def __init__(self, engine: RolloutEngine, conversation: Conversation, max_turns: int) -> None:
        self._engine, self._conversation, self._max_turns = engine, conversation, max_turns

    def generate(self, prompts: list[Prompt], samples: int, sampling: Sampling, seed: int) -> list[Rollout]:
        """See RolloutEngine. Draws depend on the seed, the turn, and the index among the unfinished episodes."""
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
