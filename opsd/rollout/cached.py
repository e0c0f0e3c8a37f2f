"""Episodes on one key-value cache: nothing is read twice, at the price of feeding the environment's tokens one by one.

For short episodes of many short turns (the word form). Each row has a queue of tokens that the environment forces:
while it holds any, the next one is fed; when it is empty, the student's own draw is.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from opsd.prompts import Prompt
from opsd.ranks import ONE_RANK, Ranks
from opsd.rollout.agent import Conversation, Episode
from opsd.rollout.base import Rollout, Sampling, jobs_of
from opsd.rollout.draws import DrawByRollout, processors, vocabulary_size
from opsd.rollout.hf import eos_token_ids


@dataclass
class _Row:
    """An episode in the batch: the turn that the student is writing, and what the environment forces next."""

    episode: Episode
    turn: list[int] = field(default_factory=list)
    queue: deque[int] = field(default_factory=deque)

    def next(self, drawn: int, eos_ids: frozenset[int], conversation: Conversation) -> int:
        """The token to feed: a forced one, or the student's, which may end its turn; any behind the end."""
        if self.queue:
            return self.queue.popleft()
        if not self.episode.done:
            self.turn.append(drawn)
            ended = drawn in eos_ids
            if ended or len(self.turn) == self.episode.room:
                self.queue.extend(self.episode.take(self.turn, not ended, conversation))
                self.turn = []
        return drawn


def _chooser(
    rows: list[_Row], sampling: Sampling, vocab_size: int, seed: int, width: int
) -> Callable[[Any, Any], torch.Tensor]:
    """Scores whose maximum is each row's next token, from (anything as wide as what was read, logits [B, V])."""
    ids = [row.episode.id for row in rows]
    steps = processors(sampling, vocab_size, DrawByRollout(seed, ids, sampling.max_new_tokens, width))
    return lambda read_BL, logits_BV: steps(read_BL, logits_BV)


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
        self._eos_ids = frozenset(eos_token_ids(model.generation_config, tokenizer))
        self._vocab_size = vocabulary_size(tokenizer)

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
        feed_BL, mask_BL = self._padded(episodes)
        width, cache = feed_BL.shape[1], DynamicCache(config=self._model.config)
        positions_BL = (mask_BL.cumsum(-1) - 1).clamp(min=0)
        rows = [_Row(episode) for episode in episodes]
        choose = _chooser(rows, sampling, self._vocab_size, seed, width)
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
            drawn = choose(mask_BL, logits_BV).argmax(-1).tolist()
            fed = [row.next(token, self._eos_ids, self._conversation) for row, token in zip(rows, drawn, strict=True)]
            playing = [place for place, row in enumerate(rows) if not row.episode.done]
            if not playing:
                return
            if 2 * len(playing) <= len(rows):
                # Most are finished: go on with the others alone.
                rows, fed = [rows[place] for place in playing], [fed[place] for place in playing]
                kept_B = torch.tensor(playing, device=mask_BL.device)
                cache.batch_select_indices(kept_B)
                mask_BL, positions_BL = mask_BL[kept_B], positions_BL[kept_B]
                choose = _chooser(rows, sampling, self._vocab_size, seed, width)
            feed_BL = torch.tensor(fed, device=mask_BL.device)[:, None]
            mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(rows), 1)], dim=1)
            positions_BL = positions_BL[:, -1:] + 1

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
