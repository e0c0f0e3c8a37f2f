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
from opsd.distill.divergence import GRADIENTS, temper_, token_fields_
from opsd.distill.inputs import LossSpec


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
    work: Workspace, student_CW: Tensor, teacher_CW: Tensor, spec: LossSpec, weight_C: Tensor | None, out_CW: Tensor
) -> Differentiated:
    """Loss and gradient of rows whose logits are used up. out_CW: `gradient_buffer`'s."""
    if work.kernels:
        return _by_kernels(student_CW, teacher_CW, spec, weight_C, out_CW)
    found = [
        _block(student_CW[block], teacher_CW[block], scratch_SBV, spec)
        for block, scratch_SBV in work.blocks(student_CW.shape[0])
    ]
    return _joined(out_CW, found, spec, weight_C)


def differentiate_held_(
    work: Workspace,
    teacher_CW: Tensor,
    kept_K: Tensor | None,
    spec: LossSpec,
    weight_K: Tensor | None,
    out_KW: Tensor,
) -> Differentiated:
    """Loss and gradient of the rows kept_K (None: all) of the workspace's logits, which are used up.

    teacher_CW: the workspace's, of all rows; or other logits, of these rows alone. out_KW: `gradient_buffer`'s. With
    torch's operations gradients are gathered at the student's buffer's head: the k-th kept row never stands before the
    k-th place, so a block overwrites nothing that a later one reads.
    """
    of_all = teacher_CW is work.teacher_CV
    if work.kernels:
        return _by_kernels(work.student_CV, teacher_CW, spec, weight_K, out_KW, kept_K, kept_K if of_all else None)
    found = []
    for block, scratch_SBV in work.blocks(out_KW.shape[0]):
        where = block if kept_K is None else kept_K[block]
        student_BW = work.copied(0, work.student_CV, where)
        teacher_BW = work.copied(1, teacher_CW, where) if of_all else teacher_CW[block]
        found.append(_block(student_BW, teacher_BW, scratch_SBV, spec))
        work.student_CV[block] = student_BW
    return _joined(out_KW, found, spec, weight_K)


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


def _by_kernels(
    student_CW: Tensor,
    teacher_CW: Tensor,
    spec: LossSpec,
    weight_C: Tensor | None,
    out_CW: Tensor,
    student_rows_C: Tensor | None = None,
    teacher_rows_C: Tensor | None = None,
) -> Differentiated:
    from opsd.distill import triton_rows

    scale_C = student_CW.new_ones(out_CW.shape[0]) if weight_C is None else weight_C
    loss_C = triton_rows.gradient_(
        spec.divergence,
        spec.beta,
        spec.temperature,
        student_CW,
        teacher_CW,
        scale_C / spec.temperature,
        out_CW,
        student_rows_C,
        teacher_rows_C,
    )
    return Differentiated(out_CW, loss_C, None)


def _block(student_BW: Tensor, teacher_BW: Tensor, scratch_SBW: Tensor, spec: LossSpec) -> tuple[Tensor, Tensor]:
    """Divergences [B] of a block; its student logits become their gradient times the mass [B] that is the second."""
    temper_(spec.temperature, student_BW, teacher_BW)
    return GRADIENTS[spec.divergence](student_BW, teacher_BW, scratch_SBW, spec.beta)


def _joined(
    gradient_CW: Tensor, found: list[tuple[Tensor, Tensor]], spec: LossSpec, weight_C: Tensor | None
) -> Differentiated:
    """The blocks of a chunk as one, with weight/(mass·T) [C, 1]: per row it costs nothing outside the gradient."""
    losses, masses = zip(*found, strict=True)
    scale_C = 1.0 / (torch.cat(masses) * spec.temperature)
    return Differentiated(
        gradient_CW, torch.cat(losses), (scale_C if weight_C is None else scale_C * weight_C)[:, None]
    )
