"""Keeps weights of linear layers in oneDNN's fastest layout while a model samples on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# A copy of the weights pays off with several rows, more than a few tokens, and weights that are too large for the CPU's
# cache (docs/performance.md).
LEAST_ROWS = 4
LEAST_TOKENS = 16
LEAST_WEIGHTS = 2**16


@contextmanager
def onednn_weights(model: PreTrainedModel, rows: int, tokens: int) -> Iterator[None]:
    """Context in which fp32 linear layers on a CPU use such copies. rows, tokens: of the batch to be decoded.

    A decoding step multiplies few rows by every weight, and torch's product re-orders the weight each time. The
    copies, as large as the weights, last as long as this context. Gradients cannot flow through them.
    """
    worth = rows >= LEAST_ROWS and tokens >= LEAST_TOKENS
    layers = _layers(model) if worth and torch.backends.mkldnn.is_available() else []
    for layer in layers:
        layer.forward = _product(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _layers(model: PreTrainedModel) -> list[Any]:
    """Modules that multiply by an fp32 weight; the head is one, whatever its class (see DistillHead).

    A module whose instance has its own forward is left alone, because something has wrapped it.
    """
    if torch.is_autocast_enabled("cpu"):
        return []
    head: Any = model.get_output_embeddings()
    linear: list[Any] = [module for module in model.modules() if type(module) is nn.Linear or module is head]
    return [module for module in linear if _fits(module.weight) and "forward" not in vars(module)]


def _fits(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.numel() >= LEAST_WEIGHTS


@torch.no_grad()
def _product(layer: Any) -> Callable[[Tensor], Tensor]:
    weight, bias = layer.weight.detach(), getattr(layer, "bias", None)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, LEAST_ROWS)
    return lambda hidden: torch.ops.mkldnn._linear_pointwise(hidden, packed, bias, "none", [], "")
