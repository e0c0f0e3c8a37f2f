"""The element-wise work on rows of both models' logits: the loss with its logit gradient, and the statistics.

Behind one face: torch's operations, block by block within the workspace's scratch (`divergence.py`), or Triton's
kernels where `chunks.has_row_kernels` says so (`triton_rows.py`), which read each logit once per pass.

Legend: C rows, B rows of a block, W width of a row (`chunks.row_width`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from opsd.distill.chunks import Workspace
from opsd.distill.divergence import GRADIENTS, SAMPLED, sampled_token_, temper_, token_fields_
from opsd.distill.inputs import LossSpec


class Logits(NamedTuple):
    """Rows of both models' logits in a workspace, to be used up. out_CW: where their gradient goes (`gradient_buffer`).

    held: they are all of a micro-batch's, and the C rows that are meant are kept_C of them (None: all). The teacher's
    may then be other logits than the workspace's, of these C rows alone.
    """

    work: Workspace
    student_CW: Tensor
    teacher_CW: Tensor
    out_CW: Tensor
    held: bool = False
    kept_C: Tensor | None = None

    @property
    def teacher_kept_C(self) -> Tensor | None:
        """Which rows of the teacher's are meant; None: all, in order."""
        return self.kept_C if self.teacher_CW is self.work.teacher_CV else None

    def block(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Both models' logits [B, W] of some of the C rows, to be overwritten: copies where they are held."""
        if not self.held:
            return self.student_CW[rows], self.teacher_CW[rows]
        where = rows if self.kept_C is None else self.kept_C[rows]
        student_BW = self.work.copied(0, self.student_CW, where)
        if self.teacher_CW is not self.work.teacher_CV:
            return student_BW, self.teacher_CW[rows]
        return student_BW, self.work.copied(1, self.teacher_CW, where)


class Differentiated(NamedTuple):
    """gradient_CW: by the logits, weights included, but for the factor scale_C1 (None: nothing is left out).

    loss_C: divergences in nats, without weights.
    """

    gradient_CW: Tensor
    loss_C: Tensor
    scale_C1: Tensor | None


def gradient_buffer(work: Workspace, rows: int, product: torch.dtype, picked: bool = False) -> Tensor:
    """Where the logit gradients of so many rows go: over the student's logits, or beside them.

    Beside them where kernels write them in the type that products take, or read rows that are picked.
    """
    logits_CW = work.student_CV[:rows]
    if not work.kernels or (product == logits_CW.dtype and not picked):
        return logits_CW
    return torch.empty_like(logits_CW, dtype=product)


def differentiate_(
    logits: Logits, spec: LossSpec, weight_C: Tensor | None, token_ids_C: Tensor | None = None
) -> Differentiated:
    """Loss and gradient of the rows that are meant. token_ids_C: for the sampled-token objective.

    With torch's operations held gradients are gathered at the head of the student's buffer: the k-th kept row never
    stands before the k-th place, so a block overwrites nothing that a later one reads.
    """
    work, out_CW = logits.work, logits.out_CW
    if work.kernels:
        return _by_kernels(logits, spec, weight_C)
    losses, masses = [], []
    for block, scratch_SBW in work.blocks(out_CW.shape[0]):
        student_BW, teacher_BW = logits.block(block)
        temper_(spec.temperature, student_BW, teacher_BW)
        if spec.divergence == SAMPLED:
            assert token_ids_C is not None
            loss_B, mass_B = sampled_token_(student_BW, teacher_BW, scratch_SBW, token_ids_C[block])
        else:
            loss_B, mass_B = GRADIENTS[spec.divergence](student_BW, teacher_BW, scratch_SBW, spec.parameter)
        losses.append(loss_B)
        masses.append(mass_B)
        if logits.held:
            out_CW[block] = student_BW
    # weight/(mass·T): per row it costs nothing outside the gradient.
    scale_C = 1.0 / (torch.cat(masses) * spec.temperature)
    return Differentiated(out_CW, torch.cat(losses), (scale_C if weight_C is None else scale_C * weight_C)[:, None])


def score_(
    needs: frozenset[str],
    work: Workspace,
    student_CW: Tensor,
    teacher_CW: Tensor | None,
    temperature: float,
    token_ids_C: Tensor | None,
    held: bool = False,
) -> dict[str, Tensor]:
    """The named fields of `TokenStats` [C]. The logits are used up, unless they are `held`: the workspace's own."""
    if work.kernels:
        from opsd.distill import triton_rows

        return triton_rows.token_fields(needs, student_CW, teacher_CW, temperature, token_ids_C)
    found: dict[str, list[Tensor]] = {name: [] for name in needs}
    for block, scratch_SBV in work.blocks(student_CW.shape[0]):
        student_BW = work.copied(0, student_CW, block) if held else student_CW[block]
        teacher_BW = None
        if teacher_CW is not None:
            teacher_BW = work.copied(1, teacher_CW, block) if held else teacher_CW[block]
        temper_(temperature, student_BW, teacher_BW)
        ids_B = None if token_ids_C is None else token_ids_C[block]
        values = token_fields_(needs, student_BW, teacher_BW, scratch_SBV, temperature, ids_B)
        for name in needs:
            found[name].append(values[name])
    return {name: torch.cat(parts) for name, parts in found.items()}


def _by_kernels(logits: Logits, spec: LossSpec, weight_C: Tensor | None) -> Differentiated:
    from opsd.distill import triton_rows

    out_CW = logits.out_CW
    scale_C = logits.student_CW.new_ones(out_CW.shape[0]) if weight_C is None else weight_C
    loss_C = triton_rows.gradient_(
        spec.divergence,
        spec.parameter,
        spec.temperature,
        logits.student_CW,
        logits.teacher_CW,
        scale_C / spec.temperature,
        out_CW,
        logits.kept_C,
        logits.teacher_kept_C,
    )
    return Differentiated(out_CW, loss_C, None)
