"""Episodes on one key-value cache: nothing is read twice, at the price of feeding the environment's tokens one by one.

For short episodes of many short turns (the word form). Each row has a queue of tokens that the environment forces:
while it holds any, the next one is fed; when it is empty, the student's own draw is.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from opsd.model.stops import eos_token_ids
from opsd.model.vocabulary import vocabulary_size
from opsd.rollout.agent import Conversation, Episode
from opsd.rollout.base import jobs_of
from opsd.rollout.decode import decode
from opsd.types import Prompt, Rollout, Sampling
from opsd.utils.distributed import ONE_RANK, Ranks


@dataclass
class _Row:
    """An episode in the batch: the turn that the student is writing, and what the environment forces next."""

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
        """The token to feed: a forced one, or the student's, which may end its turn; None behind the end."""
        if self.queue:
            return self.queue.popleft()
        if not self.episode.done:
            self.turn.append(drawn)
            ended = drawn in self.eos_ids
            if ended or len(self.turn) == self.episode.room:
                self.queue.extend(self.episode.take(self.turn, not ended, self.conversation))
                self.turn = []
        return None if self.episode.done else drawn


class CachedAgentRollout:
    """RolloutEngine of episodes on a transformers model; the settings are those of HFRollout.

    A rollout is a function of (seed, its id, its prompt, the weights): its stream has a draw for every position.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        conversation: Conversation,
        max_turns: int,
        batch_rollouts: int,
        context: Any = contextlib.nullcontext,
        ranks: Ranks = ONE_RANK,
        vocab_size: int | None = None,
        eos_ids: Iterable[int] | None = None,
    ) -> None:
        self._model, self._conversation, self._max_turns = model, conversation, max_turns
        self._batch_rollouts, self._context, self._ranks = batch_rollouts, context, ranks
        self._eos_ids = frozenset(eos_token_ids(model.generation_config, tokenizer) if eos_ids is None else eos_ids)
        self._vocab_size = vocab_size or vocabulary_size(tokenizer)

    def generate(self, prompts: list[Prompt], samples: int, sampling: Sampling, seed: int) -> list[Rollout]:
        """See RolloutEngine.generate. Position t of all responses is decided in step t."""
        jobs = jobs_of(prompts, samples, self._ranks)
        episodes = [Episode(number, prompt, sampling.max_new_tokens, self._max_turns) for number, prompt in jobs]
        rows = [_Row(episode, self._eos_ids, self._conversation) for episode in episodes]
        decode(self._model, rows, self._batch_rollouts, self._context, sampling, self._vocab_size, seed)
        # Prompts carry whole tasks: what was played travels without them.
        own = [(e.id, e.ids, e.truncated, e.mask) for e in episodes]
        played = sorted(episode for part in self._ranks.gather(own) for episode in part)
        return [Rollout(number, prompts[number // samples], ids, cut, mask) for number, ids, cut, mask in played]

    def sync(self) -> None:
        """Nothing to do: the sampler and the trainer share their weights."""
