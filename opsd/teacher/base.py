"""The interface of every teacher."""

from typing import Literal, Protocol

import torch

from opsd.types import Head, MicroBatch

Cache = Literal["device", "host"]


class Teacher(Protocol):
    """Gives final hidden states, from which the loss core forms the exact full-vocabulary distribution."""

    def hidden(self, batches: list[MicroBatch]) -> list[torch.Tensor]:
        """For each micro-batch the teacher's hidden states [N, E] at its rows, without gradient.

        E numbers per token instead of V: the whole step's states fit where one sequence's logits would not.
        """
        ...

    def head_for(self, micro: MicroBatch) -> Head | None:
        """The head for a micro-batch's states: the vocabulary projection [V, E] of the teacher that scores it.

        None if that teacher gives no states (`LogprobsTeacher`).
        """
        ...

    def end_step(self, step: int) -> None:
        """Called on all ranks after every step, whether its update was taken or skipped."""
        return

    def state(self) -> dict[str, torch.Tensor]:
        """The state to save in a checkpoint, as whole tensors on the first rank. All ranks must call it."""
        return {}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """The inverse of `state`; every rank is given the whole. Raises KeyError if something is missing."""
        return


def cached(tensor: torch.Tensor, where: Cache) -> torch.Tensor:
    """States or weights, kept for their turn where they are, or in host memory (pinned if they are on a GPU)."""
    if where == "device":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda).copy_(tensor)
