"""The student as its own teacher, in the student's own model: only weights that differ take additional memory."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from opsd.config import TeacherConfig
from opsd.engine import Engine
from opsd.model.lora import without_adapters
from opsd.teacher.base import Teacher, cached
from opsd.types import Head, MicroBatch


class SelfTeacher(Teacher):
    """Teacher in the engine's own model. Its weights, by config.weights:

    initial: the base of a student with adapters, which are off meanwhile. current: the student's, as they were at the
    last refresh. ema: at each refresh m·(the old ones) + (1 − m)·(the student's), in fp32, m = config.ema.
    They are held like the engine's master weights: as a share on each rank, if the engine partitions those. A refresh
    follows every step that is a multiple of config.every.
    """

    def __init__(self, engine: Engine, config: TeacherConfig) -> None:
        self._engine, self._config = engine, config
        self._head: Head | None = None
        self._decay = config.ema if config.weights == "ema" else 0.0
        # A teacher that is the student itself needs no copy of it.
        holds = config.weights == "ema" or config.every > 1
        self._shares = {name: share.clone() for name, share in engine.master()} if holds else {}

    @torch.no_grad()
    def hidden(self, batches: list[MicroBatch]) -> list[Tensor]:
        with self._weights():
            return [cached(self._engine.forward(micro, self._states), self._config.cache) for micro in batches]

    def head_for(self, micro: MicroBatch) -> Head:
        """The head as it was in the last call of `hidden`."""
        assert self._head is not None
        return self._head

    @torch.no_grad()
    def end_step(self, step: int) -> None:
        if self._shares and step % self._config.every == 0:
            for name, own in self._engine.master():
                self._shares[name].lerp_(own, 1.0 - self._decay)

    def state(self) -> dict[str, Tensor]:
        return self._engine.join(self._shares)

    def load_state(self, state: dict[str, Tensor]) -> None:
        if self._shares:
            self._shares = self._engine.part(state)

    def _weights(self) -> contextlib.AbstractContextManager[None]:
        if self._config.weights == "initial":
            return without_adapters(self._engine.student.model)
        return self._engine.lent(self._shares) if self._shares else contextlib.nullcontext()

    def _states(self, hidden_ND: Tensor, head: Head) -> Tensor:
        # The parameter will get another tensor, and this one is not overwritten. Not so under ZeRO-3: clone it there.
        self._head = head.changed(lambda part: part.detach().clone() if hasattr(part, "ds_id") else part.detach())
        return hidden_ND
