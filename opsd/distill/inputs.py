"""What every call of the loss core starts from: both models' states and heads, checked, and which loss is asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opsd.distill.chunks import ChunkTokens
from opsd.distill.divergence import check_divergence
from opsd.distill.matmul import Projection, product_dtype
from opsd.types import Head
from opsd.utils.errors import UserError

MEMORIES = ("fused", "whole")


@dataclass(frozen=True)
class LossSpec:
    """Which divergence, at which temperature, in chunks of at most how many tokens; memory: see `distill_loss`.

    Raises UserError for values that are not allowed.
    """

    divergence: str = "reverse_kl"
    beta: float = 0.5
    temperature: float = 1.0
    chunk_tokens: ChunkTokens = "auto"
    memory: str = "fused"

    def __post_init__(self) -> None:
        check_divergence(self.divergence, self.beta, self.temperature)
        if self.memory not in MEMORIES:
            raise UserError(f"memory {self.memory!r}: give fused or whole")


@dataclass(frozen=True)
class Inputs:
    """Both models' final hidden states and heads, checked, and the vocabulary they share.

    student_ND, teacher_NE: hidden states. student_head, teacher_head: heads in full height.
    vocab_size: rows of either head that count. student_type, teacher_type: what products are taken in;
    wide: the type of logits and sums (fp32, or fp64 if an input is). rollout_N: int64, which rollout each row belongs
    to. token_ids_N: the sampled tokens, where known. weight_N: loss weights given by the caller, None for all ones.
    """

    student_ND: Tensor
    student_head: Head
    teacher_NE: Tensor
    teacher_head: Head
    vocab_size: int
    student_type: torch.dtype
    teacher_type: torch.dtype
    wide: torch.dtype
    rollout_N: Tensor
    token_ids_N: Tensor | None
    weight_N: Tensor | None

    @property
    def rows(self) -> int:
        return self.student_ND.shape[0]

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """What gradients flow to: the student's hidden states, its head's weight, its head's bias if there is one."""
        return self.student_ND, self.student_head.weight_VD, self.student_head.bias_V

    def student_projection(self) -> Projection:
        """The student's products, cut to the shared vocabulary, outside autograd."""
        return self._projection(self.student_head, self.student_type)

    def teacher_projection(self) -> Projection:
        """The teacher's products, cut to the shared vocabulary, outside autograd."""
        return self._projection(self.teacher_head, self.teacher_type)

    def _projection(self, head: Head, product: torch.dtype) -> Projection:
        bias_V = None if head.bias_V is None else head.bias_V.detach()[: self.vocab_size]
        return Projection(head.weight_VD.detach()[: self.vocab_size], product, self.wide, bias_V)


def check_inputs(
    student_ND: Tensor,
    student_head: Tensor | Head,
    teacher_NE: Tensor,
    teacher_head: Tensor | Head,
    *,
    vocab_size: int | None = None,
    rollout_N: Tensor | None = None,
    token_ids_N: Tensor | None = None,
    weight_N: Tensor | None = None,
) -> Inputs:
    """Check shapes and settle vocabulary and types. Raises UserError naming what does not fit."""
    student_head = _checked("student", student_ND, student_head)
    teacher_head = _checked("teacher", teacher_NE, teacher_head)
    if student_ND.shape[0] != teacher_NE.shape[0]:
        raise UserError(
            f"{student_ND.shape[0]} student tokens but {teacher_NE.shape[0]} teacher tokens: "
            "give both models' hidden states at the same positions"
        )
    shared = min(student_head.weight_VD.shape[0], teacher_head.weight_VD.shape[0])
    if vocab_size is not None and not 1 <= vocab_size <= shared:
        raise UserError(f"vocab_size {vocab_size} but the smaller head has {shared} rows: give 1 to {shared}")
    student_type = product_dtype(student_ND, student_head.weight_VD)
    teacher_type = product_dtype(teacher_NE, teacher_head.weight_VD)
    wide = torch.float32
    if torch.float64 in (student_type, teacher_type):
        student_type = teacher_type = wide = torch.float64

    def per_row(name: str, values_N: Tensor | None) -> Tensor | None:
        return on_rows(name, values_N, student_ND)

    if rollout_N is None:
        rollout_N = torch.zeros(student_ND.shape[0], dtype=torch.int64)
    rollout_N = per_row("rollout_N", rollout_N)
    assert rollout_N is not None
    return Inputs(
        student_ND,
        student_head,
        teacher_NE,
        teacher_head,
        shared if vocab_size is None else vocab_size,
        student_type,
        teacher_type,
        wide,
        rollout_N.to(torch.int64),
        per_row("token_ids_N", token_ids_N),
        per_row("weight_N", weight_N),
    )


def _checked(name: str, hidden: Tensor, given: Tensor | Head) -> Head:
    """A model's head; a weight alone is a head without bias and transform. Raises UserError where it does not fit."""
    head = given if isinstance(given, Head) else Head(given)
    weight_VD, bias_V, transform = head.weight_VD, head.bias_V, head.transform
    if hidden.dim() != 2 or weight_VD.dim() != 2 or hidden.shape[1] != weight_VD.shape[1]:
        raise UserError(
            f"{name} hidden states {tuple(hidden.shape)} and head {tuple(weight_VD.shape)} do not fit: "
            "give [tokens, hidden] and [vocabulary, hidden]"
        )
    if bias_V is not None and bias_V.shape != weight_VD.shape[:1]:
        raise UserError(f"{name} head {tuple(weight_VD.shape)} and bias {tuple(bias_V.shape)} do not fit")
    if not (0.0 < transform.scale < float("inf") and (transform.softcap is None or transform.softcap > 0.0)):
        raise UserError(f"{name} head's scale {transform.scale} and softcap {transform.softcap}: give numbers above 0")
    return head


def on_rows(name: str, values_N: Tensor | None, like_ND: Tensor) -> Tensor | None:
    """An optional [N] argument on the device of `like_ND`. Raises UserError where its length is not N."""
    if values_N is None:
        return None
    rows = like_ND.shape[0]
    if tuple(values_N.shape) != (rows,):
        raise UserError(f"{name} has shape {tuple(values_N.shape)} for {rows} tokens: give one value per token")
    return values_N.to(like_ND.device)
