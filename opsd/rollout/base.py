"""The interface of rollout engines, and how rollouts are divided among ranks."""

from __future__ import annotations

from typing import Protocol

from opsd.types import Prompt, Rollout, Sampling
from opsd.utils.distributed import Ranks


def jobs_of(prompts: list[Prompt], samples: int, ranks: Ranks) -> list[tuple[int, Prompt]]:
    """This rank's rollouts, as (id, prompt).

    Ids count prompt by prompt over the whole step and do not depend on the number of ranks.
    """
    jobs = [(number * samples + k, prompt) for number, prompt in enumerate(prompts) for k in range(samples)]
    return jobs[ranks.rank :: ranks.world_size]


def gather_rollouts(own: list[Rollout], ranks: Ranks) -> list[Rollout]:
    """All ranks' rollouts, sorted by id, on every rank: token ids are small compared to everything else."""
    return sorted((rollout for part in ranks.gather(own) for rollout in part), key=lambda rollout: rollout.id)


class RolloutEngine(Protocol):
    """Samples from the current student. All ranks call its methods, in the same order."""

    def generate(self, prompts: list[Prompt], samples: int, sampling: Sampling, seed: int) -> list[Rollout]:
        """`samples` rollouts for each prompt, prompt by prompt, ids counting from 0; the same on every rank.

        A rollout is a function of (seed, its id, its prompt, the weights).
        """
        ...

    def sync(self) -> None:
        """Load the weights after the last optimiser step."""
        ...
