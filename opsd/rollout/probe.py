"""Proves that a sampler has the trained weights, by comparing log-probabilities of the same tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opsd.data.packing import pack
from opsd.engine import Engine
from opsd.types import Head, Prompt, Rollout
from opsd.utils.errors import RunStopped

# Mean difference of log-probabilities that rounding explains, in nats per token. Two fp32 implementations differ by
# 1e-5, two bfloat16 ones by 1e-2.
TOLERANCE_NATS = {"float32": 1e-3, "bfloat16": 0.1}
MOST_TOKENS = 256


class Probe:
    """The first tokens of the first of the newest rollouts.

    allowed_nats: accepted mean difference per token; None: what rounding explains in `dtype`.
    max_model_tokens: the sampler's maximum length; scoring a probe generates one more token.
    """

    def __init__(self, engine: Engine, dtype: str, allowed_nats: float | None, max_model_tokens: int) -> None:
        self._engine, self._allowed_nats = engine, allowed_nats or TOLERANCE_NATS[dtype]
        self._most = min(MOST_TOKENS, max_model_tokens - 1)
        self._ids: list[int] = []

    def take(self, rollouts: list[Rollout], score: Callable[[list[int]], list[list[float]]]) -> None:
        """Use the first of the newest rollouts as the probe; the run's first probe is checked at once."""
        if rollouts:
            first_time = not self._ids
            self._ids = (rollouts[0].prompt.ids + rollouts[0].response_ids)[: self._most]
            if first_time:
                self.check(score)

    def try_out(self, score: Callable[[list[int]], list[list[float]]], vocab_size: int) -> None:
        """`check` with the vocabulary's first tokens, before there are rollouts."""
        self._ids = list(range(min(16, self._most, vocab_size)))
        self.check(score)
        self._ids = []

    def check(self, score: Callable[[list[int]], list[list[float]]]) -> None:
        """Compare the trainer with `score`, which returns each sampler's log-probabilities (nats) of all tokens but the
        first.

        Called by all ranks. Raises RunStopped, on every rank, if any sampler differs by more than is allowed.
        """
        if len(self._ids) < 2:
            return
        for nats in score(self._ids):
            own = float((torch.tensor(nats) - trainer_log_probs(self._engine, self._ids)).abs().mean())
            gap = max(self._engine.ranks.gather(own if own == own else float("inf")))
            if gap > self._allowed_nats:
                raise RunStopped(
                    f"the sampler's log-probabilities differ from the trainer's by {gap:.2g} nats per token on a probe "
                    f"(allowed: {self._allowed_nats:g}, --rollout.probe_tolerance): its weights are not the trained "
                    "ones"
                )


@torch.no_grad()
def trainer_log_probs(engine: Engine, ids: list[int]) -> Tensor:
    """The student's log-probability of every token but the first [L - 1], in nats, on the CPU; called by all ranks."""
    (micro,) = pack([Rollout(0, Prompt("probe", "", ids[:1], None), ids[1:], truncated=True)], len(ids))

    def use(hidden_ND: Tensor, head: Head) -> Tensor:
        log_probs_NV = head.logits(hidden_ND).float().log_softmax(-1)
        return log_probs_NV.gather(-1, micro.token_ids_N.to(log_probs_NV.device)[:, None])[:, 0].cpu()

    return engine.forward(micro, use)
