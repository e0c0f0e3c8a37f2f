"""The element-wise work on rows of both models' logits: the loss with its logit gradient, and the statistics.

One interface to torch's operations, block by block within the workspace's scratch (`divergence.py`), and to Triton's
kernels (`triton_rows.py`, if `chunks.has_row_kernels`), which read each logit once per pass.

Legend: C rows, B rows of a block, W width of a row (`chunks.row_width`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from opsd.distill.chunks import slices
from opsd.distill.divergence import (
    GRADIENTS,
    SAMPLED,
    SCRATCH_BUFFERS,
    sampled_token_,
    through_cap_,
    token_fields_,
)
from opsd.distill.inputs import Inputs, LossSpec
from opsd.distill.logits import Logits
from opsd.distill.workspace import Workspace


def projected(
    inputs: Inputs, kept_K: Tensor | None, chunk: int, teacher: bool = True, kernels: bool = True, copies: bool = False
) -> Iterator[tuple[slice, slice | Tensor, Logits]]:
    """Project at most `chunk` of the kept rows (None: all) at a time. Yields which of K, which of N, and their logits.

    All in one workspace; teacher, kernels, copies: as for `Workspace.allocate`.
    """
    work = Workspace.allocate(inputs, chunk, teacher, copies, kernels)
    student_head, teacher_head = inputs.student_projection(), inputs.teacher_projection() if teacher else None
    for part in slices(inputs.rows if kept_K is None else kept_K.shape[0], chunk):
        where, count = part if kept_K is None else kept_K[part], part.stop - part.start
        student_CW, teacher_CW = student_head.project_(inputs.student_ND[where], work.student_CV[:count]), None
        if teacher_head is not None:
            teacher_CW = teacher_head.project_(inputs.teacher_NE[where], work.teacher_CV[:count], student_CW)
        yield part, where, Logits(work, student_CW, teacher_CW)


class Differentiated(NamedTuple):
    """gradient_CW: with respect to hidden·headᵀ + bias, weights included; still to be multiplied by scale_C1 if given.

    loss_C: divergences in nats, without weights.
    """

    gradient_CW: Tensor
    loss_C: Tensor
    scale_C1: Tensor | None

    def of_bias(self, height: int) -> Tensor:
        """The bias's gradient [V] over these rows, in the type of the logits."""
        grad_CV = self.gradient_CW[:, :height]
        if self.scale_C1 is None:
            return grad_CV.sum(0, dtype=self.loss_C.dtype)
        return torch.mv(grad_CV.T, self.scale_C1[:, 0])


def gradient_buffer(work: Workspace, rows: int, product: torch.dtype, picked: bool = False) -> Tensor:
    """The buffer for the logit gradients of `rows` rows: the student's logits themselves, or a new tensor.

    A new one if kernels write another type than that of the logits, or read picked rows.
    """
    logits_CW = work.student_CV[:rows]
    if not work.kernels or (product == logits_CW.dtype and not picked):
        return logits_CW
    return torch.empty_like(logits_CW, dtype=product)


def differentiate_(
    logits: Logits, spec: LossSpec, weight_C: Tensor | None, out_CW: Tensor, token_ids_C: Tensor | None = None
) -> Differentiated:
    """Loss and gradient (in out_CW, see `gradient_buffer`) of the C rows. token_ids_C: the sampled tokens.

    With torch's operations, gradients from held logits go to the first rows of the student's buffer: the k-th kept row
    is never before row k, so a block overwrites nothing that a later one reads.
    """
    work = logits.work
    transform = work.transforms[0]
    if work.kernels:
        return _by_kernels(logits, spec, weight_C, out_CW)
    losses, masses = [], []
    for block, scratch_SBW in work.blocks(out_CW.shape[0]):
        tanh_BW = None if transform.softcap is None else scratch_SBW[SCRATCH_BUFFERS]
        student_BW, teacher_BW = logits.block(block, spec.temperature, tanh_BW)
        assert teacher_BW is not None
        if spec.divergence == SAMPLED:
            assert token_ids_C is not None
            loss_B, mass_B = sampled_token_(student_BW, teacher_BW, scratch_SBW, token_ids_C[block])
        else:
            loss_B, mass_B = GRADIENTS[spec.divergence](student_BW, teacher_BW, scratch_SBW, spec.parameter)
        losses.append(loss_B)
        masses.append(mass_B)
        if tanh_BW is not None:
            through_cap_(student_BW, tanh_BW, work.vocab_size)
        if logits.held:
            out_CW[block] = student_BW
    # weight·scale/(mass·T) is kept out of the gradient: one factor per row costs nothing to apply later.
    scale_C = transform.scale / (torch.cat(masses) * spec.temperature)
    return Differentiated(out_CW, torch.cat(losses), (scale_C if weight_C is None else scale_C * weight_C)[:, None])


def score_(needs: frozenset[str], logits: Logits, temperature: float, token_ids_C: Tensor | None) -> dict[str, Tensor]:
    """The named fields of `TokenStats` [C]. The logits are overwritten, unless they are held."""
    if logits.work.kernels:
        from opsd.distill import triton_rows

        return triton_rows.token_fields(needs, logits, temperature, token_ids_C)
    found: dict[str, list[Tensor]] = {name: [] for name in needs}
    for block, scratch_SBW in logits.work.blocks(logits.rows):
        student_BW, teacher_BW = logits.block(block, temperature)
        ids_B = None if token_ids_C is None else token_ids_C[block]
        values = token_fields_(needs, student_BW, teacher_BW, scratch_SBW, ids_B)
        for name in needs:
            found[name].append(values[name])
    fields = {name: torch.cat(parts) for name, parts in found.items()}
    if "grad_norm_N" in fields:
        fields["grad_norm_N"].div_(temperature)
    return fields


def _by_kernels(logits: Logits, spec: LossSpec, weight_C: Tensor | None, out_CW: Tensor) -> Differentiated:
    from opsd.distill import triton_rows

    scale_C = logits.student_CW.new_ones(out_CW.shape[0]) if weight_C is None else weight_C
    scale_C = scale_C * (logits.work.transforms[0].scale / spec.temperature)
    return Differentiated(out_CW, triton_rows.gradient_(logits, spec, scale_C, out_CW), None)
