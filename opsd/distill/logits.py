"""Rows of both models' logits, as the loss and the statistics read them.

Legend: C rows, B rows of a block, W width of a row (`chunks.row_width`).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from opsd.distill.divergence import logits_
from opsd.distill.workspace import Workspace


class Logits(NamedTuple):
    """Rows of both models' products in a workspace, which may be overwritten; the teacher's are None without one.

    held: these are all rows of a micro-batch and must not be changed; the C rows to process are kept_C of them
    (None: all). teacher_CW may then be a tensor outside the workspace, with these C rows alone.
    """

    work: Workspace
    student_CW: Tensor
    teacher_CW: Tensor | None
    held: bool = False
    kept_C: Tensor | None = None

    @property
    def rows(self) -> int:
        """How many rows are processed, C."""
        return self.student_CW.shape[0] if self.kept_C is None else self.kept_C.shape[0]

    @property
    def teacher_kept_C(self) -> Tensor | None:
        """Which of the teacher's rows to process; None: all, in order."""
        return self.kept_C if self.teacher_CW is self.work.teacher_CV else None

    def block(self, rows: slice, temperature: float, tanh_BW: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Both models' logits [B, W] over the temperature, of some of the C rows; the caller may overwrite them.

        tanh_BW: as for `logits_`, for the student's soft cap.
        """
        student_BW = self._taken(0, self.student_CW, self.kept_C, rows)
        logits_(student_BW, self.work.transforms[0], self.work.vocab_size, temperature, tanh_BW)
        if self.teacher_CW is None:
            return student_BW, None
        teacher_BW = self._taken(1, self.teacher_CW, self.teacher_kept_C, rows)
        return student_BW, logits_(teacher_BW, self.work.transforms[1], self.work.vocab_size, temperature)

    def _taken(self, model: int, products_CW: Tensor, kept_C: Tensor | None, rows: slice) -> Tensor:
        """A model's products of a block; copies, if the workspace's own are held."""
        if not self.held or (model and products_CW is not self.work.teacher_CV):
            return products_CW[rows]
        return self.work.copied(model, products_CW, rows if kept_C is None else kept_C[rows])
