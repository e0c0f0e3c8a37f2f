"""The buffers in which chunks of tokens are processed.

Legend: C rows of a chunk, B rows of a block, V width of a row (`chunks.row_width`), S scratch buffers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from opsd.distill.chunks import BLOCK_BYTES, has_row_kernels, row_width, slices
from opsd.distill.divergence import SCRATCH_BUFFERS
from opsd.distill.inputs import Inputs
from opsd.types import Transform


@dataclass(frozen=True)
class Workspace:
    """The buffers a call reuses over its chunks: products of both models' states and heads [C, V], scratch for a block
    of rows [S, B, V].

    V is `row_width`, vocab_size or more. transforms: how the student's and the teacher's products become logits.
    Besides `SCRATCH_BUFFERS` there is one for a student's soft cap and, if copies were requested, two for a
    block of both models' logits. kernels: `has_row_kernels`; these need no scratch.
    """

    student_CV: Tensor
    teacher_CV: Tensor
    scratch_SBV: Tensor
    transforms: tuple[Transform, Transform]
    vocab_size: int
    kernels: bool = False

    @classmethod
    def allocate(
        cls, inputs: Inputs, rows: int, teacher: bool = True, copies: bool = False, kernels: bool = True
    ) -> Workspace:
        """Buffers for `rows` of the inputs' tokens, on their device; without a teacher its buffer is empty.

        kernels: whether Triton's kernels may be used, if they can run.
        """
        like, wide, transforms = inputs.student_ND, inputs.wide, inputs.transforms
        kernels = kernels and has_row_kernels(like, wide)
        used = SCRATCH_BUFFERS + (transforms[0].softcap is not None)
        # Whole rows, and the same number for each thread.
        threads = 1 if like.is_cuda else torch.get_num_threads()
        width = row_width(like.device.type, inputs.vocab_size)
        per_step = threads * (2 + used) * width * wide.itemsize
        block = min(rows, threads * max(1, BLOCK_BYTES["cuda" if like.is_cuda else "cpu"] // per_step))

        def empty(*shape: int) -> Tensor:
            return torch.empty(*shape, width, dtype=wide, device=like.device)

        scratch = 0 if kernels else used + (2 if copies else 0)
        products = empty(rows), empty(rows if teacher else 0)
        return cls(*products, empty(scratch, block), transforms, inputs.vocab_size, kernels)

    def blocks(self, rows: int) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the first `rows` rows, each with scratch of its height."""
        for block in slices(rows, self.scratch_SBV.shape[1]):
            yield block, self.scratch_SBV[:, : block.stop - block.start]

    def copied(self, model: int, products_CV: Tensor, rows: slice | Tensor) -> Tensor:
        """A copy [B, V] of some rows of a model's products (0: the student's, 1: the teacher's), to be overwritten."""
        copy_BV = self.scratch_SBV[model - 2]
        if isinstance(rows, slice):
            return copy_BV[: rows.stop - rows.start].copy_(products_CV[rows])
        return torch.index_select(products_CV, 0, rows, out=copy_BV[: len(rows)])
