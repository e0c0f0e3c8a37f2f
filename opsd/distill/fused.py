"""Loss and both gradients, formed chunk by chunk in the forward pass, so that no logits outlive their chunk.

Legend: N tokens, K trained rows, C rows of a chunk, V shared vocabulary, D and E hidden sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opsd.distill.chunks import Workspace, in_chunks, slices
from opsd.distill.held import HeldLogits
from opsd.distill.inputs import Inputs, LossSpec
from opsd.distill.rows import Differentiated, differentiate_, differentiate_held_, gradient_buffer


def fused_loss(
    inputs: Inputs, kept_K: Tensor | None, weight_K: Tensor | None, spec: LossSpec, held: HeldLogits | None = None
) -> tuple[Tensor, Tensor]:
    """Σ weight·divergence over the rows kept_K (ascending; None: all), differentiable, and the divergences [K] in nats.

    held: the logits of all rows; they are used up, and the rows need not be projected again.
    """
    student_ND, head_VD = inputs.student_ND, inputs.student_head_VD
    if not torch.is_grad_enabled():
        student_ND, head_VD = student_ND.detach(), head_VD.detach()
    run = _Run(inputs, kept_K, weight_K, spec)
    return _Fused.apply(student_ND, head_VD, run, held)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student_ND: Tensor, student_head_VD: Tensor, run: _Run, held: HeldLogits | None
    ) -> tuple[Tensor, Tensor]:
        weight_K = run.weight_K
        wanted = ctx.needs_input_grad
        loss_K, *ctx.gradients = run(wanted[0], wanted[1], held)
        loss_sum = (loss_K if weight_K is None else loss_K * weight_K).sum()
        # Only a second backward reads what is saved; the inputs are alive until the first one anyway.
        ctx.save_for_backward(student_ND, student_head_VD)
        ctx.run, ctx.head_type = run, student_head_VD.dtype
        ctx.mark_non_differentiable(loss_K)
        return loss_sum, loss_K

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not ctx.gradients:
            # The first backward gave its buffers away. Under retain_graph they are formed anew; otherwise this
            # read raises autograd's own error for a graph already freed.
            _ = ctx.saved_tensors
            _, *ctx.gradients = ctx.run(*ctx.needs_input_grad[:2])
        grad_ND, grad_VD = ctx.gradients
        ctx.gradients = ()
        # Scaled in place, the head's while still wide: a second [V, D] buffer would be the largest of all.
        if grad_ND is not None:
            grad_ND.mul_(grad_loss)
        if grad_VD is not None:
            grad_VD = grad_VD.mul_(grad_loss).to(ctx.head_type)
        return grad_ND, grad_VD, None, None


class _Chunk(NamedTuple):
    """part: which of the K rows. found: their divergences and logit gradients."""

    part: slice
    found: Differentiated


@dataclass(frozen=True)
class _Run:
    """One pass over the trained rows: their divergences and, where wanted, the gradients of the weighted sum."""

    inputs: Inputs
    kept_K: Tensor | None
    weight_K: Tensor | None
    spec: LossSpec

    @torch.no_grad()
    def __call__(
        self, hidden_wanted: bool, head_wanted: bool, held: HeldLogits | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Divergences [K] in nats; gradients of hidden [N, D] (its own type) and full head [V, D] (wide type).

        Nothing in the loop waits for the device.
        """
        inputs, spec = self.inputs, self.spec
        rows = inputs.rows if self.kept_K is None else self.kept_K.shape[0]
        loss_K = torch.zeros(rows, dtype=inputs.wide, device=inputs.student_ND.device)
        grad_ND = torch.zeros_like(inputs.student_ND) if hidden_wanted else None
        grad_VD = torch.empty_like(inputs.student_head_VD, dtype=inputs.wide) if head_wanted else None
        if not rows:
            return loss_K, grad_ND, None if grad_VD is None else grad_VD.zero_()
        logits = held

        def run(chunk: int) -> None:
            # The logits that are held serve the first try alone: it overwrites them.
            nonlocal logits
            first, logits = logits, None
            chunks = self._projected(chunk, rows) if first is None else self._held(first, rows)
            self._pass_(chunks, loss_K, grad_ND, grad_VD)

        in_chunks(run, spec.chunk_tokens, rows, inputs.vocab_size, inputs.student_ND, inputs.wide)
        return loss_K, grad_ND, grad_VD

    def _pass_(
        self,
        chunks: Iterator[_Chunk],
        loss_K: Tensor,
        grad_ND: Tensor | None,
        grad_VD: Tensor | None,
    ) -> None:
        """Fill in the results from chunks of logit gradients."""
        inputs, total_VD = self.inputs, None
        if grad_VD is not None:
            # The one sum over chunks: what a pass that ran out of memory left in it is dropped.
            total_VD = grad_VD.zero_()[: inputs.vocab_size]
        head = inputs.student_head()
        with torch.autocast(inputs.student_ND.device.type, enabled=False):
            for part, (gradient_CW, loss_C, scale_C1) in chunks:
                where = part if self.kept_K is None else self.kept_K[part]
                loss_K[part], hidden_CD = loss_C, inputs.student_ND[where]
                if scale_C1 is not None:
                    hidden_CD = hidden_CD * scale_C1
                grad_CD = head.gradients_(gradient_CW, grad_ND is not None, hidden_CD, total_VD)
                if grad_ND is not None and grad_CD is not None:
                    grad_ND[where] = (grad_CD if scale_C1 is None else grad_CD.mul_(scale_C1)).to(grad_ND.dtype)

    def _projected(self, chunk: int, rows: int) -> Iterator[_Chunk]:
        """Chunks of at most `chunk` rows, whose logits are projected."""
        inputs = self.inputs
        student_head, teacher_head = inputs.student_head(), inputs.teacher_head()
        work = Workspace.allocate(chunk, inputs.vocab_size, inputs.student_ND, inputs.wide)
        gradient_CW = gradient_buffer(work, chunk, inputs.student_type)
        for part in slices(rows, chunk):
            where = part if self.kept_K is None else self.kept_K[part]
            count = part.stop - part.start
            student_CW = student_head.project_(inputs.student_ND[where], work.student_CV[:count])
            teacher_CW = teacher_head.project_(inputs.teacher_NE[where], work.teacher_CV[:count])
            weight_C, out_CW = self._weight(part), gradient_CW[:count]
            yield _Chunk(part, differentiate_(work, student_CW, teacher_CW, self.spec, weight_C, out_CW))

    def _held(self, held: HeldLogits, rows: int) -> Iterator[_Chunk]:
        """All rows as one chunk, from logits that are there already."""
        inputs, work, everything = self.inputs, held.take(), slice(0, rows)
        teacher_CW = work.teacher_CV
        if not held.has_teacher:
            hidden_KE = inputs.teacher_NE if self.kept_K is None else inputs.teacher_NE[self.kept_K]
            teacher_CW = work.student_CV.new_empty(rows, work.student_CV.shape[1])
            inputs.teacher_head().project_(hidden_KE, teacher_CW)
        out_KW = gradient_buffer(work, rows, inputs.student_type, picked=self.kept_K is not None)
        weight_K = self._weight(everything)
        yield _Chunk(everything, differentiate_held_(work, teacher_CW, self.kept_K, self.spec, weight_K, out_KW))

    def _weight(self, part: slice) -> Tensor | None:
        return None if self.weight_K is None else self.weight_K[part]
