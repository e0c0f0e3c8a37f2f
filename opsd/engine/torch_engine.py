"""Plain PyTorch: every rank has the whole student."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import distributed

from opsd.config import EngineConfig, OptimConfig
from opsd.engine.base import Engine, optimizer_of, swapped
from opsd.model.lora import has_adapters, hold_frozen_in
from opsd.model.scorer import HeadUse, Result, Scorer
from opsd.types import MicroBatch
from opsd.utils.distributed import ONE_RANK, Ranks


class TorchEngine(Engine):
    """Engine with fp32 weights, AdamW or SGD, gradient clipping, autocast under bfloat16; ranks sum their gradients.

    Frozen weights are in the compute type.
    """

    def __init__(
        self,
        student: Scorer,
        engine: EngineConfig,
        optim: OptimConfig,
        device: torch.device,
        ranks: Ranks = ONE_RANK,
    ) -> None:
        super().__init__(student, engine, device, ranks)
        self._max_norm = optim.max_grad_norm if optim.max_grad_norm > 0 else math.inf
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
        for parameter in self._named.values() if self.ranks.world_size > 1 else ():
            if parameter.grad is None:  # unused by this rank's tokens
                parameter.grad = torch.zeros_like(parameter)
            distributed.all_reduce(parameter.grad)
        norm = float(torch.nn.utils.clip_grad_norm_(self._named.values(), self._max_norm))
        if math.isfinite(norm):
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
        self.discard()
        return norm

    def discard(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def weights(self) -> dict[str, torch.Tensor] | None:
        """See Engine. Without adapters, the model's own parameters are the weights, whole and in fp32."""
        return super().weights() if has_adapters(self.student.model) else None

    def lent(self, shares: dict[str, torch.Tensor]) -> contextlib.AbstractContextManager[None]:
        return swapped(self._named, shares)

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        state = self._optimizer.state
        return {
            f"{name}/{key}": value
            for name, parameter in self._named.items()
            for key, value in state.get(parameter, {}).items()
            if self.ranks.is_main
        }

    def load_optimizer_state(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            parameter, key = name.rsplit("/", 1)
            self._optimizer.state[self._named[parameter]][key] = tensor.to(self.device)
