"""The interface of every engine, and the learning rate, which no engine stores."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from opsd.config import EngineConfig, OptimConfig
from opsd.model.files import as_saved
from opsd.model.lora import PlainWeight, has_adapters, plain_weights, trained
from opsd.model.scorer import HeadUse, Result, Scorer
from opsd.types import MicroBatch
from opsd.utils.distributed import Ranks


class Engine(ABC):
    """The student with its optimiser, on one or more ranks. Every method is called on every rank, in the same order.

    The methods that handle weights are for weights that every rank holds whole; an engine that partitions them
    overrides how a weight is gathered and split.
    """

    def __init__(self, student: Scorer, engine: EngineConfig, device: torch.device, ranks: Ranks) -> None:
        self.student, self.device, self.ranks = student, device, ranks
        self._dtype = getattr(torch, settled(engine, device).dtype)
        if engine.gradient_checkpointing:
            student.model.gradient_checkpointing_enable({"use_reentrant": False})
        self._named = trained(student.model)

    @abstractmethod
    def sampling(self) -> contextlib.AbstractContextManager[Any]:
        """Context in which the student's own model generates: in the compute type, with whole weights on every rank."""

    @abstractmethod
    def forward(self, micro: MicroBatch, use: HeadUse[Result]) -> Result:
        """use(student_hidden_ND, student_head) inside the model's forward."""

    @abstractmethod
    def backward(self, loss_sum: torch.Tensor, global_count: float) -> None:
        """Add the gradient of loss_sum / global_count; global_count is over all micro-batches and ranks."""

    @abstractmethod
    def step(self, lr: float) -> float:
        """Clip, update with learning rate `lr`, clear the gradients; returns the gradient norm before clipping.

        A norm that is not finite leaves the weights as they are.
        """

    @abstractmethod
    def discard(self) -> None:
        """Drop the gradients that `backward` has added since the last step; weights and optimiser stay as they are."""

    def weights(self) -> dict[str, torch.Tensor] | None:
        """The plain model's whole weights in full precision on the first rank, {} on the others.

        Adapters are merged in. None if the model's own parameters are these weights.
        """
        return self._collect(self._plain_weights())

    def adapters(self) -> dict[str, torch.Tensor] | None:
        """The adapters' whole tensors in full precision on the first rank, {} on the others; None without adapters."""
        if not has_adapters(self.student.model):
            return None
        return self._collect((name, self._full_weight(p)) for name, p in self._named.items())

    def gathered(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter of the plain model, whole on every rank, one at a time, under the name that it has in a file.

        A second full copy never exists. Adapters are merged in. Experts fused into one parameter come one by one.

        A tied head comes twice, under both of its names: the receiver may keep two copies.
        """
        for plain in plain_weights(self.student.model, remove_duplicate=False):
            with self._whole(plain) as tensor:
                yield from as_saved(self.student.model, plain.name, tensor.to(plain.weight.dtype))

    def master(self) -> Iterator[tuple[str, torch.Tensor]]:
        """This rank's share of each trained weight in fp32, by name: the weight itself, or an equal flat part of it.

        A part if ZeRO partitions the optimiser's state. A caller that keeps a share must copy it.
        """
        return ((name, self._share(self._full_weight(parameter))) for name, parameter in self._named.items())

    @abstractmethod
    def lent(self, shares: dict[str, torch.Tensor]) -> contextlib.AbstractContextManager[None]:
        """Context in which the model computes with these shares' weights (as from `master`) instead of its own."""

    def join(self, shares: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The whole tensors of such shares on the first rank, {} on the others."""
        return self._collect((name, self._joined(share, self._named[name])) for name, share in shares.items())

    def part(self, whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inverse of `join`; every rank is given the whole."""
        return {name: self._share(whole[name].to(self.device)).clone() for name in self._named}

    @abstractmethod
    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """Optimiser state as whole tensors, named `parameter/moment`, on the first rank; {} on the others.

        It does not depend on the number of ranks or on how they share the state.
        """

    @abstractmethod
    def load_optimizer_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of `optimizer_state`; every rank is given the whole."""

    def _plain_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The plain model's weights, one by one, in full precision."""
        for plain in plain_weights(self.student.model):
            if plain.weight.requires_grad:
                yield plain.name, self._full_weight(plain.weight)
            else:
                with self._whole(plain) as tensor:
                    yield plain.name, tensor.float()

    def _collect(self, whole: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Form each tensor in turn, on all ranks together; the first rank keeps them in host memory."""
        kept = {}
        for name, tensor in whole:
            if self.ranks.is_main:
                kept[name] = tensor.detach().to("cpu", copy=True)
        return kept

    @contextlib.contextmanager
    def _whole(self, plain: PlainWeight) -> Iterator[torch.Tensor]:
        """A whole weight of the plain model, in the compute type or, if an adapter is merged in, in fp32."""
        yield plain.formed(plain.weight.data, plain.a, plain.b)

    def _full_weight(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """A trained parameter, whole and in fp32."""
        return parameter.data

    def _share(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of a trained tensor."""
        return whole.detach()

    def _joined(self, share: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
        """All ranks' parts as one tensor in the parameter's shape."""
        return share


def settled(engine: EngineConfig, device: torch.device) -> EngineConfig:
    """The settings with `auto` replaced by the compute type for `device`."""
    if engine.dtype != "auto":
        return engine
    bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return dataclasses.replace(engine, dtype="bfloat16" if bfloat16 else "float32")


def learning_rate(step: int, steps: int, optim: OptimConfig) -> float:
    """The rate of 1-based `step`: linear warm-up to lr, then cosine towards lr·min_lr_fraction.

    A pure function of the step, so that rate and step cannot drift apart.
    """
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    # The floor is reached one step after the last, as with a scheduler that is stepped after each update: the last
    # step still learns.
    progress = (step - 1 - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return optim.lr * (optim.min_lr_fraction + (1.0 - optim.min_lr_fraction) * cosine)


def parameter_groups(named: dict[str, torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """The optimiser's groups, none empty. Norm gains and biases are not decayed, as usual."""
    decayed = [p for p in named.values() if p.dim() >= 2]
    plain = [p for p in named.values() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def optimizer_of(named: dict[str, torch.nn.Parameter], optim: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser of every engine. SGD decays like AdamW: without momentum, both subtract lr·decay·w."""
    groups = parameter_groups(named, optim.weight_decay)
    if optim.kind == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr)
    # Fused: one pass over weights, gradients and moments, without copies; on a CPU in a quarter of the time.
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)


@contextlib.contextmanager
def swapped(named: dict[str, torch.nn.Parameter], tensors: dict[str, torch.Tensor]) -> Iterator[None]:
    """Context in which the parameters hold these whole tensors of the same shapes; then their own are restored."""
    own = {name: parameter.data for name, parameter in named.items()}
    for name, parameter in named.items():
        parameter.data = tensors[name]
    try:
        yield
    finally:
        for name, parameter in named.items():
            parameter.data = own[name]
