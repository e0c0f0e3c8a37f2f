"""A teacher in this process."""

import torch

from opsd.batch import MicroBatch
from opsd.student import Scorer


class LocalTeacher:
    """Teacher on a loaded model, frozen and in eval mode. device: where the micro-batches are computed."""

    def __init__(self, scorer: Scorer, device: torch.device) -> None:
        self._scorer, self._device = scorer.eval().requires_grad_(False), device

    @torch.no_grad()
    def hidden(self, batches: list[MicroBatch]) -> list[torch.Tensor]:
        """See Teacher.hidden. The states stay on the device until the step is over."""
        return [self._scorer.hidden(micro.to(self._device)) for micro in batches]

    def head(self) -> torch.Tensor:
        """See Teacher.head."""
        return self._scorer.head.weight
