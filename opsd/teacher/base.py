"""What every teacher must do."""

from typing import Protocol

import torch

from opsd.batch import MicroBatch


class Teacher(Protocol):
    """Gives final hidden states, from which the loss core forms the exact full-vocabulary distribution."""

    def hidden(self, batches: list[MicroBatch]) -> list[torch.Tensor]:
        """For each micro-batch the teacher's hidden states [N, E] at its rows, without gradient.

        E numbers a token instead of V: the whole step's states fit where one sequence's logits would not.
        """
        ...

    def head(self) -> torch.Tensor:
        """The teacher's vocabulary projection [V, E]."""
        ...
