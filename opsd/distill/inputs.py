"""What every call of the loss core starts from: both models' states and heads, checked, and which loss is asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opsd.distill.chunks import ChunkTokens
from opsd.distill.divergence import SAMPLED, check_divergence
from opsd.distill.matmul import Head, product_dtype
from opsd.distill.top_log_probs import TopLogProbs
from opsd.utils.errors import UserError

MEMORIES = ("fused", "whole")
ENTROPY_THRESHOLD = 0.8
"""Nats; what arXiv 2603.07079 takes."""


@dataclass(frozen=True)
class LossSpec:
    """Which divergence, at which temperature, in chunks of at most how many tokens; the rest: see `distill_loss`.

    Raises UserError for values that are not allowed.
    """

    divergence: str = "reverse_kl"
    beta: float = 0.5
    temperature: float = 1.0
    chunk_tokens: ChunkTokens = "auto"
    memory: str = "fused"
    entropy_threshold: float = ENTROPY_THRESHOLD

    @property
    def parameter(self) -> float:
        """What the divergence reads beside the logits: jsd's β, eopd's τ."""
        return self.entropy_threshold if self.divergence == "eopd" else self.beta

    @property
    def has_kernels(self) -> bool:
        """Whether Triton's kernels know this divergence; else torch's operations take its rows on CUDA too."""
        return self.divergence != SAMPLED

    def __post_init__(self) -> None:
        if self.divergence == SAMPLED and self.memory != "fused":
            raise UserError(f"memory {self.memory!r} with {SAMPLED}: give fused")
        check_divergence(self.divergence, self.beta, self.temperature)
        if self.memory not in MEMORIES:
            raise UserError(f"memory {self.memory!r}: give fused or whole")


@dataclass(frozen=True)
class Inputs:
    """Both models' final hidden states and heads, checked, and the vocabulary they share.

    student_ND, teacher_NE: hidden states. student_head_VD, teacher_head_VE: projections in full height. Without a
    teacher's head its "states" are some log-probabilities (`top_log_probs.packed`).
    vocab_size: rows of either head that count. student_type, teacher_type: what products are taken in;
    wide: the type of logits and sums (fp32, or fp64 if an input is). rollout_N: int64, which rollout each row belongs
    to. token_ids_N: the sampled tokens, where known. weight_N: loss weights given by the caller, None for all ones.
    """

    student_ND: Tensor
    student_head_VD: Tensor
    teacher_NE: Tensor
    teacher_head_VE: Tensor | None
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

    def student_head(self) -> Head:
        """The student's projection, cut to the shared vocabulary, outside autograd."""
        return Head(self.student_head_VD.detach()[: self.vocab_size], self.student_type, self.wide)

    def teacher_head(self) -> Head | TopLogProbs:
        """The teacher's projection, cut to the shared vocabulary, outside autograd."""
        if self.teacher_head_VE is None:
            return TopLogProbs(self.vocab_size)
        return Head(self.teacher_head_VE.detach()[: self.vocab_size], self.teacher_type, self.wide)


def check_inputs(
    student_ND: Tensor,
    student_head_VD: Tensor,
    teacher_NE: Tensor,
    teacher_head_VE: Tensor | None,
    *,
    vocab_size: int | None = None,
    rollout_N: Tensor | None = None,
    token_ids_N: Tensor | None = None,
    weight_N: Tensor | None = None,
) -> Inputs:
    """Check shapes and settle vocabulary and types. Raises UserError naming what does not fit."""
    for name, hidden, head in (
        ("student", student_ND, student_head_VD),
        ("teacher", teacher_NE, teacher_head_VE),
    ):
        if head is None:
            continue
        if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1]:
            raise UserError(
                f"{name} hidden states {tuple(hidden.shape)} and head {tuple(head.shape)} do not fit: "
                "give [tokens, hidden] and [vocabulary, hidden]"
            )
    if student_ND.shape[0] != teacher_NE.shape[0]:
        raise UserError(
            f"{student_ND.shape[0]} student tokens but {teacher_NE.shape[0]} teacher tokens: "
            "give both models' hidden states at the same positions"
        )
    shared = min(head.shape[0] for head in (student_head_VD, teacher_head_VE) if head is not None)
    if vocab_size is not None and not 1 <= vocab_size <= shared:
        raise UserError(f"vocab_size {vocab_size} but the smaller head has {shared} rows: give 1 to {shared}")
    student_type = product_dtype(student_ND, student_head_VD)
    teacher_type = torch.float32 if teacher_head_VE is None else product_dtype(teacher_NE, teacher_head_VE)
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
        student_head_VD,
        teacher_NE,
        teacher_head_VE,
        shared if vocab_size is None else vocab_size,
        student_type,
        teacher_type,
        wide,
        rollout_N.to(torch.int64),
        per_row("token_ids_N", token_ids_N),
        per_row("weight_N", weight_N),
    )


def on_rows(name: str, values_N: Tensor | None, like_ND: Tensor) -> Tensor | None:
    """An optional [N] argument on the device of `like_ND`. Raises UserError where its length is not N."""
    if values_N is None:
        return None
    rows = like_ND.shape[0]
    if tuple(values_N.shape) != (rows,):
        raise UserError(f"{name} has shape {tuple(values_N.shape)} for {rows} tokens: give one value per token")
    return values_N.to(like_ND.device)
