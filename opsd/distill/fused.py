"""Loss and both gradients, formed chunk by chunk in the forward pass, so that no logits outlive their chunk.

Legend: N tokens, K trained rows, C rows of a chunk, V shared vocabulary, D and E hidden sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opsd.distill.chunks import ChunkTokens, Workspace, in_chunks
from opsd.distill.divergence import GRADIENTS
from opsd.distill.inputs import Inputs
from opsd.distill.slices import slices


@dataclass(frozen=True)
class LossSpec:
    """Which divergence, at which temperature, in chunks of at most how many tokens."""

    divergence: str
    beta: float
    temperature: float
    chunk_tokens: ChunkTokens


def fused_loss(inputs: Inputs, kept_K: Tensor | None, weight_K: Tensor | None, spec: LossSpec) -> tuple[Tensor, Tensor]:
    """Σ weight·divergence over the rows kept_K (None: all), differentiable, and the divergences [K] in nats."""
    student_ND, head_VD = inputs.student_ND, inputs.student_head_VD
    if not torch.is_grad_enabled():
        student_ND, head_VD = student_ND.detach(), head_VD.detach()
    return _Fused.apply(student_ND, head_VD, inputs, kept_K, weight_K, spec)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_ND: Tensor,
        student_head_VD: Tensor,
        inputs: Inputs,
        kept_K: Tensor | None,
        weight_K: Tensor | None,
        spec: LossSpec,
    ) -> tuple[Tensor, Tensor]:
        run = _Run(inputs, kept_K, weight_K, spec, *ctx.needs_input_grad[:2])
        loss_K, *ctx.gradients = run()
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
            _, *ctx.gradients = ctx.run()
        grad_ND, grad_VD = ctx.gradients
        ctx.gradients = ()
        # Scaled in place, the head's while still wide: a second [V, D] buffer would be the largest of all.
        if grad_ND is not None:
            grad_ND.mul_(grad_loss)
        if grad_VD is not None:
            grad_VD = grad_VD.mul_(grad_loss).to(ctx.head_type)
        return grad_ND, grad_VD, None, None, None, None


@dataclass(frozen=True)
class _Run:
    """One pass over the trained rows: their divergences and, where wanted, the gradients of the weighted sum."""

    inputs: Inputs
    kept_K: Tensor | None
    weight_K: Tensor | None
    spec: LossSpec
    hidden_wanted: bool
    head_wanted: bool

    @torch.no_grad()
    def __call__(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Divergences [K] in nats; gradients of hidden [N, D] (its own type) and full head [V, D] (wide type).

        Nothing in the loop waits for the device.
        """
        inputs, spec = self.inputs, self.spec
        rows = inputs.rows if self.kept_K is None else self.kept_K.shape[0]
        loss_K = torch.zeros(rows, dtype=inputs.wide, device=inputs.student_ND.device)
        grad_ND = torch.zeros_like(inputs.student_ND) if self.hidden_wanted else None
        grad_VD = torch.empty_like(inputs.student_head_VD, dtype=inputs.wide) if self.head_wanted else None
        if not rows:
            return loss_K, grad_ND, None if grad_VD is None else grad_VD.zero_()
        shape = (rows, inputs.vocab_size, inputs.student_ND, inputs.wide)
        in_chunks(lambda chunk: self._pass_(chunk, loss_K, grad_ND, grad_VD), spec.chunk_tokens, *shape)
        return loss_K, grad_ND, grad_VD

    def _pass_(self, chunk: int, loss_K: Tensor, grad_ND: Tensor | None, grad_VD: Tensor | None) -> None:
        """Fill in the results, `chunk` rows at a time."""
        inputs, rows = self.inputs, loss_K.shape[0]
        total_VD = None
        if grad_VD is not None:
            # The one sum over chunks: what a pass that ran out of memory left in it is dropped.
            total_VD = grad_VD.zero_()[: inputs.vocab_size]
        student_head, teacher_head = inputs.student_head(), inputs.teacher_head()
        work = Workspace.allocate(chunk, inputs.vocab_size, inputs.student_ND, inputs.wide)
        with torch.autocast(inputs.student_ND.device.type, enabled=False):
            for part in slices(rows, chunk):
                where = part if self.kept_K is None else self.kept_K[part]
                count = part.stop - part.start
                hidden_CD = inputs.student_ND[where]
                logits_CV = student_head.project_(hidden_CD, work.student_CV[:count])
                teacher_CV = teacher_head.project_(inputs.teacher_NE[where], work.teacher_CV[:count])
                loss_K[part], mass_C = self._differentiate_(logits_CV, teacher_CV, work)
                scale_C1 = self._scale(part, mass_C)
                grad_CD = student_head.gradients_(logits_CV, self.hidden_wanted, hidden_CD * scale_C1, total_VD)
                if grad_ND is not None and grad_CD is not None:
                    grad_ND[where] = grad_CD.mul_(scale_C1).to(grad_ND.dtype)

    def _differentiate_(self, student_CV: Tensor, teacher_CV: Tensor, work: Workspace) -> tuple[Tensor, Tensor]:
        """Divergences [C] of a chunk; its student logits become their gradient, before `_scale`, whose mass [C] is
        the second."""
        spec, losses, masses = self.spec, [], []
        for block, scratch_SBV in work.blocks(student_CV.shape[0]):
            student_BV, teacher_BV = student_CV[block], teacher_CV[block]
            if spec.temperature != 1.0:
                student_BV.div_(spec.temperature)
                teacher_BV.div_(spec.temperature)
            loss_B, mass_B = GRADIENTS[spec.divergence](student_BV, teacher_BV, scratch_SBV, spec.beta)
            losses.append(loss_B)
            masses.append(mass_B)
        return torch.cat(losses), torch.cat(masses)

    def _scale(self, part: slice, mass_C: Tensor) -> Tensor:
        """weight/(mass·T) of the chunk's rows [C, 1]: a row's factor costs nothing outside the [C, V] gradient."""
        scale_C = 1.0 / (mass_C * self.spec.temperature)
        return (scale_C if self.weight_K is None else scale_C * self.weight_K[part])[:, None]
