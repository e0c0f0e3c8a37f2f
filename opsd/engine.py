"""What holds the student's weights: forward, backward, step. One process of plain PyTorch; others share its face."""

from __future__ import annotations

import contextlib
import math
from typing import Any, Protocol

import torch

from opsd.batch import MicroBatch
from opsd.config import EngineConfig, OptimConfig
from opsd.student import HeadUse, Result, Scorer


class Engine(Protocol):
    """The student with its optimiser, on world_size processes."""

    rank: int
    world_size: int
    device: torch.device
    student: Scorer

    def forward(self, micro: MicroBatch, use: HeadUse[Result]) -> Result:
        """use(student_hidden_ND, student_head_VD) inside the model's forward."""
        ...

    def backward(self, loss_sum: torch.Tensor, global_count: float) -> None:
        """Add the gradient of loss_sum / global_count; global_count is over all micro-batches and ranks."""
        ...

    def step(self, lr: float) -> float:
        """Clip, update with learning rate `lr`, clear the gradients; returns the gradient norm before clipping.

        A norm that is not finite leaves the weights as they are.
        """
        ...

    def sum_over_ranks(self, value: float) -> float:
        """The sum of every rank's value."""
        ...

    def reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """A CPU tensor, summed over the ranks."""
        ...

    def optimizer_state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Optimiser state as named tensors and JSON values."""
        ...

    def load_optimizer_state(self, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
        """The inverse of `optimizer_state`."""
        ...


class TorchEngine:
    """Engine for one process: fp32 weights, AdamW, gradient clipping, autocast under bfloat16."""

    rank = 0
    world_size = 1

    def __init__(self, student: Scorer, engine: EngineConfig, optim: OptimConfig, device: torch.device) -> None:
        self.student, self.device = student, device
        self._dtype, self._max_norm = getattr(torch, engine.dtype), optim.max_grad_norm
        if engine.gradient_checkpointing:
            student.model.gradient_checkpointing_enable({"use_reentrant": False})
        self._named = dict(student.model.named_parameters())
        # Norm gains and biases are not decayed, as everywhere in the field.
        decayed = [p for p in self._named.values() if p.dim() >= 2]
        plain = [p for p in self._named.values() if p.dim() < 2]
        self._optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
        )
        student.train()

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The compute type: bfloat16 with fp32 master weights, or nothing."""
        if self._dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self._dtype)

    def forward(self, micro: MicroBatch, use: HeadUse[Result]) -> Result:
        """See Engine.forward."""
        with self.autocast():
            return self.student(micro.to(self.device), use)

    def backward(self, loss_sum: torch.Tensor, global_count: float) -> None:
        """See Engine.backward."""
        (loss_sum / global_count).backward()

    def step(self, lr: float) -> float:
        """See Engine.step."""
        limit = self._max_norm if self._max_norm > 0 else math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self._named.values(), limit))
        if math.isfinite(norm):
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def sum_over_ranks(self, value: float) -> float:
        """One rank: the value itself."""
        return value

    def reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """One rank: the tensor itself."""
        return tensor

    def optimizer_state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """See Engine.optimizer_state. Names are `parameter/moment`."""
        state = self._optimizer.state
        tensors = {
            f"{name}/{key}": value
            for name, parameter in self._named.items()
            for key, value in state.get(parameter, {}).items()
        }
        return tensors, {"kind": "torch"}

    def load_optimizer_state(self, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
        """See Engine.load_optimizer_state."""
        if values["kind"] != "torch":
            raise ValueError(f"optimiser state of engine {values['kind']!r} does not fit the torch engine")
        for name, tensor in tensors.items():
            parameter, key = name.rsplit("/", 1)
            moved = tensor if key == "step" else tensor.to(self.device)
            self._optimizer.state[self._named[parameter]][key] = moved


def learning_rate(step: int, steps: int, optim: OptimConfig) -> float:
    """The rate of 1-based `step`: linear warm-up to lr, then cosine towards lr·min_lr_fraction.

    A pure function of the step, so that it cannot drift from it.
    """
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    # The floor is reached one step behind the last, as with a scheduler that is stepped afterwards: the last step
    # still learns.
    progress = (step - 1 - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return optim.lr * (optim.min_lr_fraction + (1.0 - optim.min_lr_fraction) * cosine)
