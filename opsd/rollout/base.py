"""What a rollout is, and what every engine that makes them must do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from opsd.prompts import Prompt
from opsd.ranks import Ranks


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0 is greedy; top_p 1 and top_k 0 are off. max_new_tokens: tokens."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 8192


@dataclass(frozen=True)
class Rollout:
    """One answer of the student, as token ids from the sampler (never re-tokenised).

    id: unique over the step and all ranks. response_ids: end with EOS unless truncated.
    student_mask: for each response token, True where the student wrote it (False: tool output);
    None means all True. truncated: the length limit came before EOS.
    """

    id: int
    prompt: Prompt
    response_ids: list[int]
    truncated: bool
    student_mask: list[bool] | None = field(default=None)

    def student_tokens(self) -> int:
        """How many response tokens the student wrote."""
        return len(self.response_ids) if self.student_mask is None else sum(self.student_mask)


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
