"""Rock tokens: vocabulary entries whose loss stays high over a run, left out of training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from opsd.config.settings import Fraction, PositiveInt
from opsd.selection import Selection, TokenStats
from opsd.utils.errors import UserError
from tip_patch.groups import Rollouts
from tip_patch.normalise import Reduce
from tip_patch.sampling import uniform_draws
from tip_patch.selector import Selector, read_field


@dataclass(eq=False)
class RockBypass(Selector):
    """Leave out the tokens whose loss stays high over the run.

    After "Rock Tokens" (arXiv 2605.09253), whose score of a vocabulary entry v is R(v) = mean loss·frequency: the Σδ of
    its tokens. Rocks are the entries of highest R among those whose mean δ is above that of all tokens, until they
    number `most` or hold `most_of_tokens` of all tokens. Our reading: the paper finds them once, from the loss at the
    start and end of a run and the similarity of contexts; here R and the means are over the steps so far, with weight
    decay^age for a step's tokens, so that an entry that is learnt drops out. None are left out in the first
    after_steps steps.

    Of what is left, ρ of each rollout's tokens are kept at random (the paper: all, ρ = 1); the count varies. State: Σδ
    and count by token id, which change between steps only and are part of a checkpoint.
    """

    retention: Fraction = 1.0
    most: PositiveInt = 100
    most_of_tokens: Fraction = 0.18
    after_steps: PositiveInt = 10
    decay: Fraction = 0.98

    name: ClassVar[str] = "rock_bypass"
    needs: ClassVar[frozenset[str]] = frozenset({"reverse_kl_N", "token_ids_N"})
    fixed_budget: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()

        self._steps = 0
        # Row 0: number of tokens of each id; row 1: their Σδ in nats. Of past steps, and of this step on this rank.
        self._known_2V = self._seen_2V = torch.zeros(2, 0, dtype=torch.float64)
        self._rocks_K = torch.zeros(0, dtype=torch.int64)

    def choose(self, stats: TokenStats, rollouts: Rollouts, budget_R: Tensor, seed: int) -> Selection:
        """Keep at most budget_R rows of each rollout, no rock among them; a rollout may keep none."""
        ids_N = read_field(stats, "token_ids_N", self.name)
        self._see(ids_N, read_field(stats, "reverse_kl_N", self.name), stats.vocab_size)
        rock_N = torch.isin(ids_N, self._rocks_K.to(ids_N.device))
        score_N = torch.where(rock_N, -1.0, uniform_draws(rollouts, seed, self.name))
        return Selection(rollouts.top(score_N, budget_R) & ~rock_N)

    def end_step(self, reduce: Reduce) -> None:
        seen_2V = reduce(self._seen_2V).cpu()
        known_2V = self._known_2V if self._known_2V.shape == seen_2V.shape else torch.zeros_like(seen_2V)
        self._known_2V, self._steps = known_2V * self.decay + seen_2V, self._steps + 1
        self._settle()

    def state_dict(self) -> dict[str, Any]:
        ids = self._known_2V[0].nonzero().squeeze(-1)
        tokens, nats = self._known_2V[:, ids].tolist()
        vocab = self._known_2V.shape[1]
        return {"steps": self._steps, "vocab": vocab, "ids": ids.tolist(), "tokens": tokens, "nats": nats}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps = int(state["steps"])
        self._known_2V = torch.zeros(2, int(state["vocab"]), dtype=torch.float64)
        self._known_2V[:, state["ids"]] = torch.tensor([state["tokens"], state["nats"]], dtype=torch.float64)
        self._settle()

    def _see(self, ids_N: Tensor, nats_N: Tensor, vocab_size: int | None) -> None:
        """Add a micro-batch's tokens to this step's."""
        if vocab_size is None:
            raise UserError("rock_bypass keeps a sum for each token id: give TokenStats its vocab_size")
        ids_N, nats_N = ids_N.cpu(), nats_N.double().cpu()
        counts = (torch.bincount(ids_N, w, vocab_size).double() for w in (torch.ones_like(nats_N), nats_N))
        seen_2V = torch.stack(list(counts))
        self._seen_2V = seen_2V if self._seen_2V.shape != seen_2V.shape else self._seen_2V + seen_2V

    def _settle(self) -> None:
        """Decide which ids are rocks in the next step, and reset what this step has seen."""
        self._seen_2V = torch.zeros_like(self._known_2V)
        self._rocks_K = torch.zeros(0, dtype=torch.int64)
        if self._steps >= self.after_steps:
            self._rocks_K = rocks(self._known_2V[0], self._known_2V[1], self.most, self.most_of_tokens)


def rocks(tokens_V: Tensor, nats_V: Tensor, most: int, most_of_tokens: float) -> Tensor:
    """Ids of the rock tokens, highest Σδ first; tokens_V, nats_V: count and Σδ by id, fp64. See RockBypass."""
    all_tokens, all_nats = tokens_V.sum(), nats_V.sum()
    high_V = nats_V * all_tokens > all_nats * tokens_V
    order_V = torch.where(high_V, nats_V, -1.0).argsort(descending=True, stable=True)[: int(high_V.sum())]
    held_V = tokens_V[order_V].cumsum(0)
    return order_V[held_V <= most_of_tokens * all_tokens][:most]
