"""The loss's matrix products in bf16 with fp32 results: their error against fp64 and their rate, also at an odd V.

Legend: C rows of a chunk, V vocabulary, W width of a row of logits, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.meter import seconds_of
from gpu.check import BF16_ERROR, FP32_ERROR, Check, Row, relative
from opsd.distill.chunks import row_width
from opsd.distill.matmul import Projection

# Rows, or entries of the vocabulary, that are compared with fp64.
COMPARED = 64
# A sum over the whole vocabulary. On a CPU it comes out in bf16.
LONG_SUM_ERROR = {"cuda": 1e-3, "cpu": BF16_ERROR}


def products(check: Check) -> None:
    """Every product, at each vocabulary, chunk and width that the loss uses."""
    student, teacher = check.sizes.widths
    for vocab in check.sizes.vocabs:
        for rows in check.sizes.chunks:
            for width in (student, teacher):
                found = _Products(check, vocab, rows, width)
                about = {"vocab": vocab, "chunk": rows, "width": width}
                check.tried("logits", found.logits, FP32_ERROR, **about)
                if width == student:
                    check.tried("hidden gradient", found.hidden_gradient, LONG_SUM_ERROR[check.device.type], **about)
                    check.tried("head gradient", found.head_gradient, FP32_ERROR, **about)


class _Products:
    """Operands of one size: hidden states, a head, and a logit gradient, all with values that bf16 can hold."""

    def __init__(self, check: Check, vocab: int, rows: int, width: int) -> None:
        self._check, self._flop = check, 2.0 * rows * vocab * width
        self._hidden_CD = self._drawn(rows, width)
        self._head = Projection(self._drawn(vocab, width, scale=width**-0.5), torch.bfloat16, torch.float32)
        self._logits_CW = torch.empty(rows, row_width(check.device.type, vocab), device=check.device)
        # CUDA kernels write it in the dtype of the products; on a CPU it stays fp32.
        written = torch.bfloat16 if check.on_cuda else torch.float32
        self._grad_CW = torch.zeros_like(self._logits_CW, dtype=written)
        self._grad_CW[:, :vocab] = self._drawn(rows, vocab, scale=1e-3)
        self._vocab = vocab

    def _drawn(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=self._check.device) * scale).bfloat16()

    def _timed(self, run: Callable[[], object]) -> Row:
        seconds = seconds_of(run, self._check.device)
        return {"ms": 1e3 * seconds, "tflops": self._flop / seconds / 1e12, **self._check.kernels(run)}

    def logits(self) -> Row:
        """hidden · headᵀ."""
        found = self._timed(lambda: self._head.project_(self._hidden_CD, self._logits_CW))
        exact_CV = self._hidden_CD[:COMPARED].double() @ self._head.weight_VD.double().T
        return {**found, "error": relative(self._logits_CW[:COMPARED, : self._vocab], exact_CV)}

    def hidden_gradient(self) -> Row:
        """gradient · head."""

        def run() -> Tensor:
            grad_CD = self._head.gradients_(self._grad_CW, True, self._hidden_CD, None)
            assert grad_CD is not None
            return grad_CD

        exact_CD = self._grad_CW[:COMPARED, : self._vocab].double() @ self._head.weight_VD.double()
        return {**self._timed(run), "error": relative(run()[:COMPARED], exact_CD)}

    def head_gradient(self) -> Row:
        """gradientᵀ · hidden, added to the existing sum."""
        total_VD = torch.zeros(self._head.weight_VD.shape, device=self._check.device)

        def run() -> None:
            self._head.gradients_(self._grad_CW, False, self._hidden_CD, total_VD)

        found = self._timed(run)
        total_VD.zero_()
        run()
        exact_VD = self._grad_CW[:, :COMPARED].double().T @ self._hidden_CD.double()
        return {**found, "error": relative(total_VD[:COMPARED], exact_VD)}
