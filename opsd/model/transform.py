"""How a model computes logits with its head: scale, soft cap and bias, found by measuring."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from opsd.model.attention import compute_dtype
from opsd.model.scorer import body_of
from opsd.types import Transform
from opsd.utils.errors import UserError


@torch.no_grad()
def find_transform(model: PreTrainedModel, name: str) -> Transform:
    """What a model does to its head's output: measured, and verified on the model's own logits.

    Raises UserError if it is more than a scale and a soft cap.
    """
    check_head_alone(model.get_output_embeddings(), name)
    return transform_of(model, name)


@torch.no_grad()
def check_head_alone(head: Any, name: str) -> None:
    """Make sure that the head is a product with its weight [V, D], plus its bias if any. Raises UserError."""
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    if not (isinstance(weight, Tensor) and weight.dim() == 2 and weight.dtype.is_floating_point):
        raise UserError(f"{name}: its head is not a plain matrix ({type(head).__name__}); this trainer needs one")
    given = torch.linspace(-1, 1, 4 * weight.shape[1], dtype=weight.dtype, device=weight.device)
    given_LD = given.view(4, -1)
    ours = functional.linear(given_LD, weight, bias)
    check_finite(ours, name)
    if not _alike(head(given_LD), ours):
        raise _unknown(name)


@torch.no_grad()
def transform_of(model: PreTrainedModel, name: str) -> Transform:
    """`find_transform` for a model whose head was checked. The model is run three times, on four tokens."""
    ids = torch.arange(4, device=model.device)[None] % model.config.get_text_config().vocab_size
    head: Any = model.get_output_embeddings()
    model.eval()
    # Known numbers in place of the head's output show what the model does to them.
    given: list[Tensor] = []
    replaced = head.register_forward_hook(lambda _module, _inputs, output: given.append(_ladder(output)) or given[0])
    try:
        seen = model(input_ids=ids, use_cache=False).logits
    finally:
        replaced.remove()
    own, output = (
        model(input_ids=ids, use_cache=False).logits,
        head(body_of(model)(input_ids=ids, use_cache=False).last_hidden_state),
    )
    check_finite(output, name)
    transform = _fit(given[0], seen)
    if transform is None or not _alike(own, transform(output)):
        raise _unknown(name)
    return transform


def _ladder(like: Tensor) -> Tensor:
    """Numbers of both signs from 2^-10 to 2^20, in fp64 and the shape of a head's output, all exact in bfloat16."""
    steps = torch.logspace(-10, 20, like.numel() // 2 + 1, base=2.0, dtype=torch.float64, device=like.device)
    return torch.stack([-steps, steps], 1).flatten()[-like.numel() :].view(like.shape).bfloat16().double()


def _fit(given: Tensor, seen: Tensor) -> Transform | None:
    """The transform that turned `given`, a `_ladder`, into `seen`; None if none does, to five digits."""
    if seen.shape != given.shape:
        return None
    given, seen = given.flatten(), seen.double().flatten()
    top, highest, tenth = float(given[-1]), float(seen[-1]), float(seen[(given - given[-1] / 10).abs().argmin()])
    if not highest > 0.0:
        return None
    if highest > 2 * tenth:
        cap, scale = None, highest / top
    else:
        # There is a cap. The output nearest to half of it determines the scale best.
        middle = int((seen / highest - 0.5).abs().argmin())
        cap, scale = highest, math.atanh(min(float(seen[middle]) / highest, 0.99)) * highest / float(given[middle])
    # Round, so that a scale of 1 is exactly 1.
    found = Transform(float(f"{scale:.9g}"), cap)
    fits = found.scale > 0.0 and torch.allclose(found(given), seen, rtol=1e-5, atol=0.0)
    return found if fits else None


def check_finite(logits: Tensor, name: str) -> None:
    """Raises UserError for logits that are not finite."""
    if not torch.isfinite(logits).all():
        raise UserError(f"{name}: its logits are not finite; the weights are damaged, give another copy")


def _alike(own: Tensor, ours: Tensor) -> bool:
    """Whether two computations of the same products agree, within the precision of their type."""
    allowed = 1e-4 if compute_dtype(ours) == torch.float32 else 1e-2
    return torch.allclose(own.float(), ours.float(), rtol=allowed, atol=allowed * float(ours.abs().max()))


def _unknown(name: str) -> UserError:
    return UserError(
        f"{name}: its logits are not hidden·head + bias, scaled and soft-capped; this trainer supports nothing else"
    )
