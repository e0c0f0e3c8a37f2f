"""One random stream a rollout, whatever is generated beside it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from opsd.rollout.base import Sampling
from opsd.seeding import derive_seed


class DrawByRollout:
    """Leaves one token possible in every row: the one that the row's own stream draws from its distribution.

    Greedy generation then takes it. rollout_ids: the rows' rollouts. prompt_tokens: the batch's padded width.
    """

    def __init__(self, seed: int, rollout_ids: list[int], max_new_tokens: int, prompt_tokens: int) -> None:
        streams = [torch.Generator().manual_seed(derive_seed(seed, "draws", number)) for number in rollout_ids]
        self._uniform_BT = torch.stack(
            [torch.rand(max_new_tokens, generator=stream, dtype=torch.float64) for stream in streams]
        )
        self._prompt_tokens = prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, V] to 0 at the drawn token and -inf elsewhere."""
        self._uniform_BT = self._uniform_BT.to(scores.device)
        # fp64: in fp32 the running sum of 150,000 probabilities is coarser than the rare ones of them.
        mass_BV = scores.double().softmax(-1).cumsum(-1)
        place = input_ids.shape[1] - self._prompt_tokens
        drawn_B1 = self._uniform_BT[:, place, None] * mass_BV[:, -1:]
        # The first token whose cumulated mass is above the draw; one without mass is never that.
        token_B1 = torch.searchsorted(mass_BV, drawn_B1, right=True)
        return torch.full_like(scores, float("-inf")).scatter_(1, token_B1, 0.0)


class OnlyTokens:
    """Cuts off the rows of a padded vocabulary that the tokenizer has no token for: the loss gives them no chance."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, V] of the first vocab_size rows."""
        return scores[:, : self._vocab_size]


def vocabulary_size(tokenizer: Any) -> int:
    """The tokenizer's largest id + 1; a model may have more rows."""
    return max(tokenizer.get_vocab().values()) + 1


def processors(sampling: Sampling, vocab_size: int, draw: DrawByRollout) -> LogitsProcessorList:
    """The tokenizer's tokens only; then temperature, top-k, top-p, the draw: transformers' own order.

    At temperature 0 greedy generation follows.
    """
    steps = LogitsProcessorList([OnlyTokens(vocab_size)])
    if sampling.temperature == 0:
        return steps
    if sampling.temperature != 1.0:
        steps.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        steps.append(TopPLogitsWarper(sampling.top_p))
    steps.append(draw)
    return steps
