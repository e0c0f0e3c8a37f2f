"""Logits that are projected once and read twice: by the choice of tokens, then by the loss on the chosen ones.

Only if the logits of all rows of a micro-batch take no more memory than one chunk does with a large vocabulary.
"""

from __future__ import annotations

import torch

from opsd.distill.chunks import may_hold
from opsd.distill.inputs import Inputs, LossSpec
from opsd.distill.rows import projected
from opsd.distill.workspace import Workspace
from opsd.utils.errors import is_out_of_memory


class HeldLogits:
    """The products of all rows, in a workspace; the teacher's only if requested."""

    def __init__(self, work: Workspace) -> None:
        self._work: Workspace | None = work
        self.has_teacher = work.teacher_CV.shape[0] > 0

    @property
    def work(self) -> Workspace:
        """The workspace, for reading only."""
        assert self._work is not None, "these logits were taken already"
        return self._work

    def take(self) -> Workspace:
        """The workspace, which the caller may overwrite: it cannot be read or taken again."""
        work, self._work = self.work, None
        return work


@torch.no_grad()
def hold_logits(inputs: Inputs, spec: LossSpec, teacher: bool) -> HeldLogits | None:
    """All rows' logits; None if they may not all exist at once, or if memory runs out."""
    like, rows = inputs.student_ND, inputs.rows
    if not rows or not may_hold(spec.chunk_tokens, rows, inputs.vocab_size, like, inputs.wide):
        return None
    try:
        with torch.autocast(like.device.type, enabled=False):
            *_, logits = next(projected(inputs, None, rows, teacher, spec.has_kernels, copies=True))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None
    return HeldLogits(logits.work)
