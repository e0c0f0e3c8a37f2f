"""One random stream per rollout, independent of the rest of the batch."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from opsd.types import Sampling
from opsd.utils.errors import RunStopped
from opsd.utils.seeding import derive_seed


class Draws:
    """Samples each row's next token: the likeliest one at temperature 0, else a draw from the row's random stream.

    rollout_ids: the rows' rollouts. vocab_size: only ids below it are sampled; the loss gives the padded vocabulary's
    other ids probability 0, too.
    """

    def __init__(
        self, seed: int, rollout_ids: list[int], sampling: Sampling, vocab_size: int, device: torch.device
    ) -> None:
        self._vocab_size, self._greedy, self._warpers = vocab_size, sampling.temperature == 0, _warpers(sampling)
        self._rollout_ids = rollout_ids
        streams = [torch.Generator().manual_seed(derive_seed(seed, "draws", number)) for number in rollout_ids]
        self._uniform_BT = torch.stack(
            [torch.rand(sampling.max_new_tokens, generator=stream, dtype=torch.float64) for stream in streams]
        ).to(device)

    def __call__(self, logits_BV: Tensor, place: int) -> list[int]:
        """B token ids, from logits in fp32. place: their position in the response.

        Raises RunStopped if logits are not finite, because then no token can be drawn.
        """
        tokens = self._draw(logits_BV[:, : self._vocab_size], place).tolist()
        if max(tokens) >= self._vocab_size:
            number = self._rollout_ids[tokens.index(max(tokens))]
            raise RunStopped(f"rollout {number}: the model's logits are not finite; its weights are damaged")
        return tokens

    def _draw(self, scores_BV: Tensor, place: int) -> Tensor:
        if self._greedy:
            return scores_BV.argmax(-1)
        scores_BV = self._warpers(None, scores_BV)  # pyrefly: ignore[bad-argument-type] (none of them reads the ids)
        # fp64: in fp32 the rounding error of a running sum of 150,000 probabilities exceeds the rare ones.
        mass_BV = scores_BV.double().softmax(-1).cumsum_(-1)
        drawn_B1 = self._uniform_BT[:, place, None] * mass_BV[:, -1:]
        # The first token whose cumulative mass exceeds the draw, so never one without mass. V if there is none.
        return torch.searchsorted(mass_BV, drawn_B1, right=True)[:, 0]

    def keep(self, places: list[int]) -> None:
        """Continue with these rows only."""
        self._rollout_ids = [self._rollout_ids[place] for place in places]
        self._uniform_BT = self._uniform_BT[places]


def _warpers(sampling: Sampling) -> LogitsProcessorList:
    """Temperature, top-k, top-p, in transformers' order."""
    steps = LogitsProcessorList()
    if sampling.temperature not in (0, 1):
        steps.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        steps.append(TopPLogitsWarper(sampling.top_p))
    return steps
