"""Linear layers of a model that samples on a CPU, with their weights in the layout that oneDNN multiplies fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# What pays for a copy of the weights: more than one row, more than a few tokens, and weights that are too large to stay
# in cache as they are (docs/performance.md).
LEAST_ROWS = 4
LEAST_TOKENS = 16
LEAST_WEIGHTS = 2**16


@contextmanager
def onednn_weights(model: PreTrainedModel, rows: int, tokens: int) -> Iterator[None]:
    """Within it linear layers of fp32 on a CPU multiply by such copies; rows and tokens say how often.

    A step of decoding multiplies few rows by every weight. The product of torch re-orders the weight each time; the
    copy, as large as the weights, lasts as long as this context. Nothing of it can be differentiated.
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
    """Modules that are a product with their fp32 weight; the head is one, of whatever class (see DistillHead).

    One whose instance has a forward of its own is left alone: that is somebody's wrapper.
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
