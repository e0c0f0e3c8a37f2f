"""The baseline: the trained rows' logits live through backward, as in the paper's own code.

It exists to reproduce the paper's memory rows and to check the fused loss on real runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import log_softmax

from opsd.distill.chunks import chunk_rows, row_width
from opsd.distill.divergence import plain_divergence
from opsd.distill.fused import Trained
from opsd.distill.inputs import Inputs
from opsd.distill.matmul import Projection
from opsd.types import PLAIN


def materialized_loss(trained: Trained) -> tuple[Tensor, Tensor]:
    """Same meaning as `FusedLoss`; autograd differentiates, and memory grows with rows × vocabulary."""
    inputs, kept_K, weight_K, spec = trained.inputs, trained.kept_K, trained.weight_K, trained.spec
    student_KD, teacher_KE = inputs.student_ND, inputs.teacher_NE
    if kept_K is not None:
        student_KD, teacher_KE = student_KD[kept_K], teacher_KE[kept_K]
    logits_KV = _Project.apply(student_KD, *inputs.leaves[1:], inputs)
    with torch.no_grad():
        teacher_KV = _project(inputs, teacher_KE, teacher=True)
    if any(transform != PLAIN for transform in inputs.transforms):
        # The padding beyond the vocabulary must not be scaled or capped.
        logits_KV, teacher_KV = (
            transform(products_KW[:, : inputs.vocab_size])
            for transform, products_KW in zip(inputs.transforms, (logits_KV, teacher_KV), strict=True)
        )
    rows = student_KD.shape[0]
    chunk = chunk_rows(spec.chunk_tokens, rows, inputs.vocab_size, student_KD, inputs.wide)
    losses = []
    with torch.autocast(student_KD.device.type, enabled=False):
        # One split, not slices: each slice's backward would fill and add a whole [K, V] of zeros.
        for student_CV, teacher_CV in zip(logits_KV.split(chunk), teacher_KV.split(chunk), strict=True):
            log_p_CV = log_softmax(student_CV / spec.temperature, -1)
            log_q_CV = log_softmax(teacher_CV / spec.temperature, -1)
            losses.append(plain_divergence(spec.divergence, log_p_CV, log_q_CV, spec.parameter))
        loss_K = torch.cat(losses)
        loss_sum = (loss_K if weight_K is None else loss_K * weight_K).sum()
    return loss_sum, loss_K.detach().clamp_min(0.0)


def _project(inputs: Inputs, hidden_KD: Tensor, teacher: bool) -> Tensor:
    """All rows' products [K, W] over the shared vocabulary, in the wide type; rows may be wider than that."""
    head = inputs.teacher_projection() if teacher else inputs.student_projection()
    assert isinstance(head, Projection), "whole logits are formed from hidden states alone"
    width = row_width(hidden_KD.device.type, inputs.vocab_size)
    out_KW = torch.empty(hidden_KD.shape[0], width, dtype=inputs.wide, device=hidden_KD.device)
    with torch.autocast(hidden_KD.device.type, enabled=False):
        return head.project_(hidden_KD, out_KW)


class _Project(torch.autograd.Function):
    """Student products in the wide type, with gradients by the same products as the fused loss."""

    @staticmethod
    def forward(ctx: Any, hidden_KD: Tensor, head_VD: Tensor, bias_V: Tensor | None, inputs: Inputs) -> Tensor:
        ctx.save_for_backward(hidden_KD, head_VD, bias_V)
        ctx.inputs = inputs
        return _project(inputs, hidden_KD, teacher=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_KV: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        hidden_KD, head_VD, bias_V = ctx.saved_tensors
        head, height = ctx.inputs.student_projection(), ctx.inputs.vocab_size
        if head.joined is not None:
            grad_KV = grad_KV.clone()  # the original belongs to autograd
            head.part_(grad_KV, hidden_KD)
        grad_VD = total_VD = grad_V = None
        if ctx.needs_input_grad[1]:
            grad_VD = torch.zeros_like(head_VD, dtype=ctx.inputs.wide)
            total_VD = grad_VD[:height]
        if ctx.needs_input_grad[2]:
            grad_V = torch.zeros_like(bias_V)
            grad_V[:height] = grad_KV[:, :height].sum(0)
        grad_KD = head.gradients_(grad_KV, ctx.needs_input_grad[0], hidden_KD.to(ctx.inputs.wide), total_VD)
        return (
            None if grad_KD is None else grad_KD.to(hidden_KD.dtype),
            None if grad_VD is None else grad_VD.to(head_VD.dtype),
            grad_V,
            None,
        )
