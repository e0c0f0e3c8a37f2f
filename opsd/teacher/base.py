"""What every teacher must do."""

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import torch

from opsd.types import MicroBatch
from opsd.utils.errors import UserError

Cache = Literal["device", "host"]
# Settings of a model's configuration that change logits behind the head; the loss knows none of them.
BENT_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


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


def check_logit_settings(settings: Mapping[str, Any], path: str) -> None:
    """For a teacher whose own logits cannot be measured here. Raises UserError where its settings bend them."""
    bent = [name for name in BENT_LOGITS if settings.get(name) not in (None, 1, 1.0)]
    if bent:
        raise UserError(
            f"--teacher {path}: its config.json sets {bent[0]}; this trainer needs plain hidden·head logits"
        )


def cached(hidden_NE: torch.Tensor, where: Cache) -> torch.Tensor:
    """The states as they wait for the student's turn: where they are, or in host memory (pinned beside a GPU)."""
    if where == "device":
        return hidden_NE
    host_NE = torch.empty(hidden_NE.shape, dtype=hidden_NE.dtype, pin_memory=hidden_NE.is_cuda)
    return host_NE.copy_(hidden_NE)
