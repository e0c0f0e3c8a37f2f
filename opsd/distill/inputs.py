"""The inputs of every call of the loss core: both models' states and heads, checked, and which loss to compute."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opsd.distill.chunks import ChunkTokens
from opsd.distill.divergence import SAMPLED, check_divergence
from opsd.distill.matmul import Joined, Projection, product_dtype
from opsd.distill.top_log_probs import TopLogProbs
from opsd.types import NO_STOPS, PLAIN, Head, Stops, Transform
from opsd.utils.errors import UserError

MEMORIES = ("fused", "whole")
ENTROPY_THRESHOLD = 0.8
"""Nats; the value of arXiv 2603.07079."""


@dataclass(frozen=True)
class LossSpec:
    """The divergence, its temperature, and the maximum tokens per chunk; for the rest see `distill_loss`.

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
        """The divergence's own parameter: jsd's β, eopd's τ."""
        return self.entropy_threshold if self.divergence == "eopd" else self.beta

    @property
    def has_kernels(self) -> bool:
        """Whether the Triton kernels support this divergence; else torch's operations compute it, on CUDA too."""
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

    student_ND, teacher_NE: hidden states. student_head, teacher_head: heads with all their rows. Without a teacher's
    head its "states" are some log-probabilities (`top_log_probs.packed`).
    vocab_size: how many rows of each head are used. student_type, teacher_type: what products are computed in;
    wide: the type of logits and sums (fp32, or fp64 if an input is). rollout_N: int64, which rollout each row belongs
    to. token_ids_N: the sampled tokens, if known. weight_N: loss weights given by the caller, None for all ones.
    stops: the tokens that end a turn. temperature: at which stops are joined.
    """

    student_ND: Tensor
    student_head: Head
    teacher_NE: Tensor
    teacher_head: Head | None
    vocab_size: int
    student_type: torch.dtype
    teacher_type: torch.dtype
    wide: torch.dtype
    rollout_N: Tensor
    token_ids_N: Tensor | None
    weight_N: Tensor | None
    stops: Stops = NO_STOPS
    temperature: float = 1.0

    @property
    def rows(self) -> int:
        return self.student_ND.shape[0]

    @property
    def stop_N(self) -> Tensor | None:
        """Which of the sampled tokens end a turn, bool [N]; None if tokens or stops are not known."""
        if self.token_ids_N is None or not self.stops.ids:
            return None
        return _any_of(self.token_ids_N, self.stops.ids)

    @property
    def scored_ids_N(self) -> Tensor | None:
        """The sampled tokens' columns in the distributions: that of their first one for joined stops."""
        if self.token_ids_N is None or not self.stops.joined:
            return self.token_ids_N
        return self.token_ids_N.masked_fill(_any_of(self.token_ids_N, self.stops.ids), self.stops.ids[0])

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The tensors that get gradients: the student's hidden states, its head's weight, and bias if there is one."""
        return self.student_ND, self.student_head.weight_VD, self.student_head.bias_V

    def student_projection(self) -> Projection:
        """The student's projection, cut to the shared vocabulary, outside autograd."""
        return self._projection(self.student_head, self.student_type)

    @property
    def transforms(self) -> tuple[Transform, Transform]:
        """How the student's and the teacher's products become logits."""
        return self.student_head.transform, PLAIN if self.teacher_head is None else self.teacher_head.transform

    def teacher_projection(self) -> Projection | TopLogProbs:
        """The teacher's projection, cut to the shared vocabulary, outside autograd."""
        if self.teacher_head is None:
            return TopLogProbs(self.vocab_size, self.student_head.transform)
        return self._projection(self.teacher_head, self.teacher_type)

    def _projection(self, head: Head, product: torch.dtype) -> Projection:
        bias_V = None if head.bias_V is None else head.bias_V.detach()[: self.vocab_size]
        # Products are joined before the head's scale multiplies them.
        joined = Joined(self.stops.ids, self.temperature / head.transform.scale) if self.stops.joined else None
        return Projection(head.weight_VD.detach()[: self.vocab_size], product, self.wide, bias_V, joined)


def check_inputs(
    student_ND: Tensor,
    student_head: Tensor | Head,
    teacher_NE: Tensor,
    teacher_head: Tensor | Head | None,
    *,
    vocab_size: int | None = None,
    rollout_N: Tensor | None = None,
    token_ids_N: Tensor | None = None,
    weight_N: Tensor | None = None,
    stops: Stops = NO_STOPS,
    temperature: float = 1.0,
) -> Inputs:
    """Check shapes and settle vocabulary and types. Raises UserError naming what does not fit.

    temperature: the loss's; stops are joined at it.
    """
    student_head = _checked("student", student_ND, student_head)
    teacher_head = None if teacher_head is None else _checked("teacher", teacher_NE, teacher_head)
    if stops.joined and not (teacher_head is not None and can_join(student_head, teacher_head)):
        who = "a teacher without a head" if teacher_head is None else "a head with a soft cap"
        raise UserError(f"{who} has no logit for joined stops: give stops that are not joined")
    if student_ND.shape[0] != teacher_NE.shape[0]:
        raise UserError(
            f"{student_ND.shape[0]} student tokens but {teacher_NE.shape[0]} teacher tokens: "
            "give both models' hidden states at the same positions"
        )
    shared = min(head.weight_VD.shape[0] for head in (student_head, teacher_head) if head is not None)
    if vocab_size is not None and not 1 <= vocab_size <= shared:
        raise UserError(f"vocab_size {vocab_size} but the smaller head has {shared} rows: give 1 to {shared}")
    student_type = product_dtype(student_ND, student_head.weight_VD)
    teacher_type = torch.float32 if teacher_head is None else product_dtype(teacher_NE, teacher_head.weight_VD)
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
        stops,
        temperature,
    )


def can_join(*heads: Head) -> bool:
    """Whether joined stops have a logit under these heads: a capped logit cannot rise above its cap."""
    return all(head.transform.softcap is None for head in heads)


def _checked(name: str, hidden: Tensor, given: Tensor | Head) -> Head:
    """A model's head; a weight alone is a head without bias and transform. Raises UserError if it does not fit."""
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
    """An optional [N] argument on the device of `like_ND`. Raises UserError if its length is not N."""
    if values_N is None:
        return None
    rows = like_ND.shape[0]
    if tuple(values_N.shape) != (rows,):
        raise UserError(f"{name} has shape {tuple(values_N.shape)} for {rows} tokens: give one value per token")
    return values_N.to(like_ND.device)


def _any_of(token_ids_N: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """Which of the ids are among `tokens`, without waiting for the device."""
    found_N = torch.zeros_like(token_ids_N, dtype=torch.bool)
    for token in tokens:
        found_N |= token_ids_N == token
    return found_N
