"""A teacher in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from opsd.batch import MicroBatch
from opsd.student import Scorer
from opsd.teacher.base import Cache, cached


class LocalTeacher:
    """Teacher on a loaded model, frozen and in eval mode. device: where the micro-batches are computed.

    offload: between its turns the model lies in host memory; only its head stays on the device. cache: where the states
    of a step wait, "device" or "host".
    """

    def __init__(
        self,
        scorer: Scorer,
        device: torch.device,
        offload: bool = False,
        cache: Cache = "device",
    ) -> None:
        self._scorer, self._device = scorer.eval().requires_grad_(False), device
        self._offload = offload
        self._cache: Cache = cache
        # Where nothing is offloaded this is the model's own tensor.
        self._head_VE = scorer.head.weight.detach()
        if offload:
            self._head_VE = self._head_VE.to(device, copy=True)
            self._scorer.to("cpu")

    @torch.no_grad()
    def hidden(self, batches: list[MicroBatch]) -> list[Tensor]:
        """See Teacher.hidden. The states are kept until the step is over."""
        with self.present():
            return [cached(self._scorer.hidden(micro.to(self._device)), self._cache) for micro in batches]

    def head(self) -> Tensor:
        """See Teacher.head."""
        return self._head_VE

    @contextlib.contextmanager
    def present(self) -> Iterator[None]:
        """Within it the whole model is on the device."""
        if self._offload:
            self._scorer.to(self._device)
        try:
            yield
        finally:
            if self._offload:
                self._scorer.to("cpu")
