"""What a rollout is, and what every engine that makes them must do."""

from __future__ import annotations

from typing import Protocol

from opsd.types import Prompt, Rollout, Sampling
from opsd.utils.distributed import Ranks


def jobs_of(prompts: list[Prompt], samples: int, ranks: Ranks) -> list[tuple[int, Prompt]]:
    """The rollouts that fall to this rank, as (id, prompt).

    Ids count prompt by prompt over the whole step, whatever the number of ranks.
    """
    jobs = [(number * samples + k, prompt) for number, prompt in enumerate(prompts) for k in range(samples)]
    return jobs[ranks.rank :: ranks.world_size]


def gather_rollouts(own: list[Rollout], ranks: Ranks) -> list[Rollout]:
    """All ranks' rollouts, by id, on every rank: token ids are small beside everything else."""
    return sorted((rollout for part in ranks.gather(own) for rollout in part), key=lambda rollout: rollout.id)


class RolloutEngine(Protocol):
    """Samples from the current student. Every rank calls, in the same order."""

    def generate(self, prompts: list[Prompt], samples: int, sampling: Sampling, seed: int) -> list[Rollout]:
        """`samples` rollouts for each prompt, prompt by prompt, ids counting from 0; the same on every rank.

        A rollout is a function of (seed, its id, its prompt, the weights).
        """
        ...

    def sync(self) -> None:
        """Take over the weights that the last optimiser step made."""
        ...
