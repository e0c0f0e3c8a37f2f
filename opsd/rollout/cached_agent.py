"""Episodes on one KV cache: no token is computed twice, but the environment's tokens are fed one by one.

For short episodes of many short turns (the word form). Each row has a queue of forced tokens, from the environment:
the next one is fed if there is any, otherwise the token that the student drew.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from opsd.rollout.agent import Conversation, Episode
from opsd.rollout.base import RolloutEngine, jobs_of
from opsd.rollout.hf import HFRollout
from opsd.types import Prompt, Rollout, Sampling


@dataclass
class _Row:
    """An episode in the batch: the turn that the student is writing, and the queue of forced tokens."""

    episode: Episode
    eos_ids: frozenset[int]
    conversation: Conversation
    turn: list[int] = field(default_factory=list)
    queue: deque[int] = field(default_factory=deque)

    @property
    def id(self) -> int:
        return self.episode.id

    @property
    def prompt(self) -> Prompt:
        return self.episode.prompt

    def next(self, drawn: int) -> int | None:
        """The token to feed: a forced one, or the student's, which may end its turn; None after the end."""
        if self.queue:
            return self.queue.popleft()
        if not self.episode.done:
            self.turn.append(drawn)
            ended = drawn in self.eos_ids
            if ended or len(self.turn) == self.episode.room:
                self.queue.extend(self.episode.take(self.turn, not ended, self.conversation))
                self.turn = []
        return None if self.episode.done else drawn


class CachedAgentRollout(RolloutEngine):
    """RolloutEngine of episodes, with the model and settings of `engine`.

    A rollout is a function of (seed, its id, its prompt, the weights): its random stream has one draw per position.
    """

    def __init__(self, engine: HFRollout, conversation: Conversation, max_turns: int) -> None:
        self._engine, self._conversation, self._max_turns = engine, conversation, max_turns

    def generate(self, prompts: list[Prompt], samples: int, sampling: Sampling, seed: int) -> list[Rollout]:
        """See RolloutEngine. Position t of all responses is sampled in decoding step t."""
        ranks = self._engine.ranks
        jobs = jobs_of(prompts, samples, ranks)
        episodes = [Episode(number, prompt, sampling.max_new_tokens, self._max_turns) for number, prompt in jobs]
        rows = [_Row(episode, self._engine.eos_ids, self._conversation) for episode in episodes]
        self._engine.grow(rows, sampling, seed)
        # Prompts contain whole tasks, so episodes are gathered without them.
        own = [(e.id, e.ids, e.truncated, e.mask) for e in episodes]
        played = sorted(episode for part in ranks.gather(own) for episode in part)
        return [Rollout(number, prompts[number // samples], ids, cut, mask) for number, ids, cut, mask in played]

    def sync(self) -> None:
        """Nothing to do: the sampler and the trainer share their weights."""
