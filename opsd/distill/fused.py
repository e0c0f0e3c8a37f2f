"""Loss and both gradients, formed chunk by chunk in the forward pass, so that no logits outlive their chunk.

If a whole micro-batch's logits are small enough, they are held for both passes instead (`held.py`).

Legend: N tokens, K trained rows, C rows of a chunk, V shared vocabulary, D and E hidden sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opsd.distill.chunks import attempts
from opsd.distill.held import HeldLogits
from opsd.distill.inputs import Inputs, LossSpec
from opsd.distill.logits import Logits
from opsd.distill.rows import differentiate_, gradient_buffer, projected


@dataclass(frozen=True)
class Trained:
    """The rows of a micro-batch that are trained on: kept_K (ascending; None: all), with their weights."""

    inputs: Inputs
    kept_K: Tensor | None
    weight_K: Tensor | None
    spec: LossSpec

    @property
    def rows(self) -> int:
        """How many rows are trained on, K."""
        return self.inputs.rows if self.kept_K is None else self.kept_K.shape[0]

    def where(self, part: slice) -> slice | Tensor:
        """Where a part of the K trained rows is among the N rows."""
        return part if self.kept_K is None else self.kept_K[part]


class FusedLoss(torch.autograd.Function):
    """apply(*inputs.leaves, trained, held) → Σ weight·divergence, differentiable, and the divergences [K].

    held: the logits of all rows, if they exist already; they are overwritten.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, head_VD: Tensor, bias_V: Tensor | None, trained: Trained, held: HeldLogits | None
    ) -> tuple[Tensor, Tensor]:
        weight_K = trained.weight_K
        loss_K, *ctx.gradients = differentiate(trained, ctx.needs_input_grad[:3], held)
        loss_sum = (loss_K if weight_K is None else loss_K * weight_K).sum()
        # Only a second backward reads what is saved; the inputs are alive until the first one anyway.
        ctx.save_for_backward(hidden_ND, head_VD, bias_V)
        ctx.trained = trained
        ctx.mark_non_differentiable(loss_K)
        return loss_sum, loss_K

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        if not ctx.gradients:
            # The first backward gave its buffers away. Under retain_graph they are computed again; otherwise this
            # read raises autograd's own error for a graph already freed.
            _ = ctx.saved_tensors
            _, *ctx.gradients = differentiate(ctx.trained, ctx.needs_input_grad[:3])
        gradients, ctx.gradients = ctx.gradients, ()
        # Scale in place, the head's gradient while still wide: a second [V, D] buffer would be the largest of all.
        leaves = ctx.trained.inputs.leaves
        return (
            *(
                None if grad is None or leaf is None else grad.mul_(grad_loss).to(leaf.dtype)
                for grad, leaf in zip(gradients, leaves, strict=True)
            ),
            None,
            None,
        )


@torch.no_grad()
def differentiate(
    trained: Trained, wanted: Sequence[bool], held: HeldLogits | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Divergences [K] in nats; gradients of hidden states [N, D] (their own type), full head [V, D] and its bias [V]
    (wide type).

    They are of the weighted sum; those that are not wanted are None. Nothing in the loop waits for the device.
    """
    inputs, weight_K, rows = trained.inputs, trained.weight_K, trained.rows
    loss_K = torch.zeros(rows, dtype=inputs.wide, device=inputs.student_ND.device)
    types = (inputs.student_ND.dtype, inputs.wide, inputs.wide)
    grad_ND, grad_VD, grad_V = (
        torch.zeros_like(leaf, dtype=dtype) if leaf is not None and asked else None
        for leaf, dtype, asked in zip(inputs.leaves, types, wanted, strict=True)
    )
    if not rows:
        return loss_K, grad_ND, grad_VD, grad_V
    head, chunk_tokens, height = inputs.student_projection(), trained.spec.chunk_tokens, inputs.vocab_size
    for attempt in attempts(chunk_tokens, rows, height, inputs.student_ND, inputs.wide):
        # Drop what an attempt that ran out of memory left: its buffers, and the sums over chunks.
        logits = out_CW = found = grad_CD = hidden_CD = None
        total_VD, total_V = (None if total is None else total.zero_()[:height] for total in (grad_VD, grad_V))
        with attempt as chunk, torch.autocast(inputs.student_ND.device.type, enabled=False):
            # Only the first attempt can use the held logits: it overwrites them.
            chunks, held = _projected(trained, chunk) if held is None else _held(trained, held), None
            for part, logits, out_CW in chunks:
                where = trained.where(part)
                weight_C = None if weight_K is None else weight_K[part]
                ids_C = None if inputs.scored_ids_N is None else inputs.scored_ids_N[where]
                found = differentiate_(logits, trained.spec, weight_C, out_CW, ids_C)
                head.part_(found.gradient_CW, inputs.student_ND[where])
                loss_K[part], hidden_CD = found.loss_C, inputs.student_ND[where]
                if found.scale_C1 is not None:
                    hidden_CD = hidden_CD * found.scale_C1
                if total_V is not None:
                    total_V.add_(found.of_bias(height))
                grad_CD = head.gradients_(found.gradient_CW, grad_ND is not None, hidden_CD, total_VD)
                if grad_ND is not None and grad_CD is not None:
                    grad_CD = grad_CD if found.scale_C1 is None else grad_CD.mul_(found.scale_C1)
                    grad_ND[where] = grad_CD.to(grad_ND.dtype)
    return loss_K, grad_ND, grad_VD, grad_V


def _projected(trained: Trained, chunk: int) -> Iterator[tuple[slice, Logits, Tensor]]:
    """Project at most `chunk` of the K rows at a time. Yields which rows, their logits, and the buffer for their
    gradient."""
    gradient_CW = None
    for part, _, logits in projected(trained.inputs, trained.kept_K, chunk, kernels=trained.spec.has_kernels):
        if gradient_CW is None:
            gradient_CW = gradient_buffer(logits.work, chunk, trained.inputs.student_type)
        yield part, logits, gradient_CW[: logits.rows]


def _held(trained: Trained, held: HeldLogits) -> Iterator[tuple[slice, Logits, Tensor]]:
    """Like `_projected`, but all K rows at once, from logits that exist already."""
    inputs, kept_K, work, everything = trained.inputs, trained.kept_K, held.take(), slice(0, trained.rows)
    teacher_CW = work.teacher_CV
    if not held.has_teacher:
        teacher_CW = work.student_CV.new_empty(trained.rows, work.student_CV.shape[1])
        where = trained.where(everything)
        inputs.teacher_projection().project_(inputs.teacher_NE[where], teacher_CW, work.student_CV[where])
    out_KW = gradient_buffer(work, trained.rows, inputs.student_type, picked=kept_K is not None)
    yield everything, Logits(work, work.student_CV, teacher_CW, held=True, kept_C=kept_K), out_KW
