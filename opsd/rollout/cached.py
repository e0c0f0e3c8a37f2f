"""Episodes on one key-value cache: nothing is read twice, at the price of feeding the environment's tokens one by one.

For short episodes of many short turns (the word form). Each row has a queue of tokens that the environment forces:
while it holds any, the next one is fed; when it is empty, the student's own draw is.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from typing import Any, cast

import torch
from transformers import DynamicCache, PreTrainedModel

from opsd.prompts import Prompt
from opsd.ranks import ONE_RANK, Ranks
from opsd.rollout.agent import Conversation, Episode
from opsd.rollout.base import Rollout, Sampling, jobs_of
from opsd.rollout.draws import DrawByRollout, processors
from opsd.rollout.hf import eos_token_ids


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
    ) -> None:
        self._model, self._conversation, self._max_turns = model, conversation, max_turns
        self._batch_rollouts, self._context, self._ranks = batch_rollouts, context, ranks
        self._eos_ids = frozenset(eos_token_ids(model, tokenizer))

    def generate(self, prompts: list[Prompt], samples: int, sampling: Sampling, seed: int) -> list[Rollout]:
        """See RolloutEngine.generate."""
        jobs = jobs_of(prompts, samples, self._ranks)
        jobs.sort(key=lambda job: (len(job[1].ids), job[0]))
        episodes = [Episode(number, prompt, sampling.max_new_tokens, self._max_turns) for number, prompt in jobs]
        with self._eval_mode(), self._context():
            for first in range(0, len(episodes), self._batch_rollouts):
                self._play(episodes[first : first + self._batch_rollouts], sampling, seed)
        # Prompts carry whole tasks: what was played travels without them.
        own = [(e.id, e.ids, e.truncated, e.mask) for e in episodes]
        played = sorted(episode for part in self._ranks.gather(own) for episode in part)
        return [Rollout(number, prompts[number // samples], ids, cut, mask) for number, ids, cut, mask in played]

    def sync(self) -> None:
        """Nothing to do: the sampler and the trainer share their weights."""

    @torch.no_grad()
    def _play(self, episodes: list[Episode], sampling: Sampling, seed: int) -> None:
        """Episodes side by side to their ends; position t of all responses is decided in step t."""
        ids_BL, mask_BL = self._padded(episodes)
        width, cache = ids_BL.shape[1], DynamicCache(config=self._model.config)
        draw = DrawByRollout(seed, [episode.id for episode in episodes], sampling.max_new_tokens, width)
        choose = processors(sampling, draw) if sampling.temperature > 0 else None
        turns: list[list[int]] = [[] for _ in episodes]
        queues: list[deque[int]] = [deque() for _ in episodes]
        positions_BL = (mask_BL.cumsum(-1) - 1).clamp(min=0)
        feed_BL = ids_BL
        while True:
            logits_BV = self._model(
                input_ids=feed_BL,
                attention_mask=mask_BL,
                position_ids=positions_BL,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            # The draw reads how far we are off the width of what it is shown.
            scores_BV: Any = logits_BV if choose is None else choose(cast(Any, mask_BL), cast(Any, logits_BV))
            drawn = scores_BV.argmax(-1).tolist()
            fed = [
                queue.popleft() if queue else self._student(episode, turn, queue, token)
                for episode, turn, queue, token in zip(episodes, turns, queues, drawn, strict=True)
            ]
            if all(episode.done for episode in episodes):
                return
            feed_BL = torch.tensor(fed, device=ids_BL.device)[:, None]
            mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(episodes), 1)], dim=1)
            positions_BL = positions_BL[:, -1:] + 1

    def _student(self, episode: Episode, turn: list[int], queue: deque[int], token: int) -> int:
        """Take the student's token; where it ends the turn, queue what the environment answers."""
        if not episode.done:
            turn.append(token)
            ended = token in self._eos_ids
            if ended or len(turn) == episode.room:
                queue.extend(episode.take(list(turn), not ended, self._conversation))
                turn.clear()
        return token

    def _padded(self, episodes: list[Episode]) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompts [B, L], padded at the left, and their mask; any id pads, it is masked."""
        width = max(len(episode.prompt.ids) for episode in episodes)
        ids_BL = torch.zeros(len(episodes), width, dtype=torch.int64)
        mask_BL = torch.zeros_like(ids_BL)
        for row, episode in enumerate(episodes):
            ids_BL[row, width - len(episode.prompt.ids) :] = torch.tensor(episode.prompt.ids)
            mask_BL[row, width - len(episode.prompt.ids) :] = 1
        return ids_BL.to(self._model.device), mask_BL.to(self._model.device)

    @contextlib.contextmanager
    def _eval_mode(self) -> Iterator[None]:
        was_training = self._model.training
        self._model.eval()
        try:
            yield
        finally:
            self._model.train(was_training)
