"""A teacher in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from opsd.model.scorer import Scorer
from opsd.teacher.base import Cache, Teacher, cached
from opsd.types import Head, MicroBatch


class LocalTeacher(Teacher):
    """Teacher on a loaded model, frozen and in eval mode. device: where the micro-batches are computed.

    offload: between its turns the model is in host memory (pinned for a GPU); only its head and buffers stay on the
    device. cache: where the states of a step are kept, "device" or "host".
    """

    def __init__(
        self,
        scorer: Scorer,
        device: torch.device,
        offload: bool = False,
        cache: Cache = "device",
    ) -> None:
        self.scorer, self._device = scorer.eval().requires_grad_(False), device
        self._cache: Cache = cache
        self._head = scorer.head.as_head().changed(Tensor.detach)
        # The loss needs the head between turns too: it is never moved, nor are embeddings that are tied to it.
        stay = {id(p) for p in scorer.head.parameters()}
        moved = [p for p in scorer.parameters() if id(p) not in stay] if offload else []
        # Frozen weights never change: one host copy serves every turn, and nothing is copied back.
        self._offloaded = [(parameter, cached(parameter.detach(), "host")) for parameter in moved]
        self._leave()

    @torch.no_grad()
    def hidden(self, batches: list[MicroBatch]) -> list[Tensor]:
        with self.present():
            return [cached(self.scorer.hidden(micro.to(self._device)), self._cache) for micro in batches]

    def head_for(self, micro: MicroBatch) -> Head:
        return self._head

    @contextlib.contextmanager
    def present(self) -> Iterator[None]:
        """Context in which the whole model is on the device."""
        for parameter, host in self._offloaded:
            # From pinned memory the copies run asynchronously.
            parameter.data = host.to(self._device, non_blocking=True, copy=True)
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        for parameter, host in self._offloaded:
            parameter.data = host
