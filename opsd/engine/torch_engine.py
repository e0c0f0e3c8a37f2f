"""One process of plain PyTorch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch

from opsd.config import EngineConfig, OptimConfig
from opsd.engine.base import Engine, optimizer_of, settled, swapped
from opsd.model.files import as_saved
from opsd.model.lora import has_adapters, hold_frozen_in, plain_weights, trained
from opsd.model.scorer import HeadUse, Result, Scorer
from opsd.types import MicroBatch
from opsd.utils.distributed import ONE_RANK


class TorchEngine(Engine):
    """Engine for one process: fp32 weights, AdamW or SGD, gradient clipping, autocast under bfloat16.

    Frozen weights are in the compute type.
    """

    ranks = ONE_RANK

    def __init__(self, student: Scorer, engine: EngineConfig, optim: OptimConfig, device: torch.device) -> None:
        self.student, self.device, engine = student, device, settled(engine, device)  # pyrefly: ignore[read-only]
        self._dtype, self._max_norm = getattr(torch, engine.dtype), optim.max_grad_norm
        if engine.gradient_checkpointing:
            student.model.gradient_checkpointing_enable({"use_reentrant": False})
        self._named = trained(student.model)
        hold_frozen_in(self._dtype, student.model)
        self._optimizer = optimizer_of(self._named, optim)
        student.train()

    def sampling(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast if the compute type is bfloat16 (trained weights stay fp32), else nothing."""
        if self._dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self._dtype)

    def forward(self, micro: MicroBatch, use: HeadUse[Result]) -> Result:
        with self.sampling():
            return self.student(micro.to(self.device), use)

    def backward(self, loss_sum: torch.Tensor, global_count: float) -> None:
        (loss_sum / global_count).backward()

    def step(self, lr: float) -> float:
        limit = self._max_norm if self._max_norm > 0 else math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self._named.values(), limit))
        if math.isfinite(norm):
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def discard(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def weights(self) -> dict[str, torch.Tensor] | None:
        """See Engine. Without adapters, the model's own parameters are the weights, whole and in fp32."""
        if not has_adapters(self.student.model):
            return None
        return {
            plain.name: plain.formed(plain.weight, plain.a, plain.b).detach().to("cpu", torch.float32)
            for plain in plain_weights(self.student.model)
        }

    def adapters(self) -> dict[str, torch.Tensor] | None:
        return {name: p.data for name, p in self._named.items()} if has_adapters(self.student.model) else None

    def gathered(self) -> Iterator[tuple[str, torch.Tensor]]:
        for plain in plain_weights(self.student.model, remove_duplicate=False):
            weight = plain.formed(plain.weight, plain.a, plain.b).detach().to(plain.weight.dtype)
            yield from as_saved(self.student.model, plain.name, weight)

    def master(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, parameter.detach()) for name, parameter in self._named.items())

    def lent(self, shares: dict[str, torch.Tensor]) -> contextlib.AbstractContextManager[None]:
        return swapped(self._named, shares)

    def join(self, shares: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return shares

    def part(self, whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: whole[name].to(self.device) for name in self._named}

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        state = self._optimizer.state
        return {
            f"{name}/{key}": value
            for name, parameter in self._named.items()
            for key, value in state.get(parameter, {}).items()
        }

    def load_optimizer_state(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            parameter, key = name.rsplit("/", 1)
            self._optimizer.state[self._named[parameter]][key] = tensor.to(self.device)
