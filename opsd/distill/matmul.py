"""The four matrix products of the loss, with fp32 accumulation whatever the input type.

On CUDA half-precision inputs go to the tensor cores and the result comes out in fp32 (`out_dtype`). Torch has no such
product for CPUs, and a bf16 result would round the logits. There the head is widened one tile of rows at a time, and
oneDNN is allowed to multiply in bf16: values that were bf16 are not rounded again, and sums and results stay fp32.
fp32 products also go to oneDNN if the processor has AVX-512: torch's own `mm` uses MKL, which uses vectors of
half the length on processors of other makers (docs/performance.md has the numbers).

Rows of logits may be wider than the vocabulary (`row_width`). The padding is filled so that it does not change any
softmax, and enters no product: rows of a head beyond the shared vocabulary may hold anything.

Legend: C rows of a chunk, V shared vocabulary, W width of a row of logits, T rows of a tile of the vocabulary, D hidden
size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from opsd.distill.chunks import slices

# How much of the head a CPU multiplies at once: a tile in wide precision, and the chunk's logits over it, stay in cache
# until they are used.
TILE_BYTES = 8 * 2**20
TILE_ROWS = 1024
# On CUDA a product over the vocabulary is split into a multiple of this many rows and the rest: kernels for the
# tensor cores read several entries at a time.
ALIGNED_ROWS = 64
# The value of logits beyond the vocabulary: its exp is 0 next to any logit, and unlike with -inf, BEYOND - BEYOND is 0.
BEYOND = -1e30
ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def product_dtype(hidden: Tensor, head: Tensor) -> torch.dtype:
    """The type products are computed in: autocast's if it is on, else the wider of the two inputs'."""
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    return torch.promote_types(hidden.dtype, head.dtype)


@contextmanager
def bf16_products() -> Iterator[None]:
    """Lets CPU products of fp32 tensors round their operands to bf16; sums and results stay fp32."""
    setting = torch.backends.mkldnn.matmul  # pyrefly: ignore[missing-attribute]
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


def _onednn(left_MK: Tensor, right_NK: Tensor) -> Tensor:
    """left · rightᵀ in fp32."""
    return torch.ops.mkldnn._linear_pointwise(left_MK, right_NK, None, "none", [], "")


@dataclass(frozen=True)
class Joined:
    """Tokens that count as one, with the sum of their probabilities, in the first one's column.

    temperature: the products are divided by it before log_softmax.
    """

    ids: tuple[int, ...]
    temperature: float = 1.0

    def join_(self, products_CW: Tensor) -> Tensor:
        """Put T·ln Σ exp(x/T) of these tokens into the first one's column, and give the others probability 0."""
        first, *rest = self.ids
        own_EC = torch.stack([products_CW[:, token] for token in self.ids])
        products_CW[:, first] = torch.logsumexp(own_EC / self.temperature, 0) * self.temperature
        for token in rest:
            products_CW[:, token] = BEYOND
        return products_CW

    def part_(self, grad_CW: Tensor, products_CE: Tensor) -> None:
        """Spread the joined token's gradient over all of them, by their own products: the chain rule of `join_`."""
        whole_C = grad_CW[:, self.ids[0]].clone()
        share_CE = torch.softmax(products_CE / self.temperature, -1)
        for place, token in enumerate(self.ids):
            grad_CW[:, token] = whole_C * share_CE[:, place]


class Projection:
    """A head's weight [V, D] read in `product` precision, with results in `wide` precision, and its bias [V] if any.

    Holds no copy of the weight, unless CUDA needs it cast. joined: tokens whose logits are merged into one.
    """

    def __init__(
        self,
        weight_VD: Tensor,
        product: torch.dtype,
        wide: torch.dtype,
        bias_V: Tensor | None = None,
        joined: Joined | None = None,
    ) -> None:
        self.product, self.wide, self.joined = product, wide, joined
        self.bias_V = None if bias_V is None else bias_V.to(wide)
        self.on_cuda = weight_VD.is_cuda
        self.weight_VD = weight_VD.to(product) if self.on_cuda else weight_VD
        self.direct = self.weight_VD.dtype == product == wide
        self.onednn = ONEDNN and not self.on_cuda and product == wide == torch.float32

    def _precision(self) -> AbstractContextManager[None]:
        # Not on CUDA: the setting is for CPU products, and applies to the whole process.
        return bf16_products() if self.product == torch.bfloat16 and not self.on_cuda else nullcontext()

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the vocabulary with their rows, rounded to the product type and widened."""
        height, width = self.weight_VD.shape
        for rows in slices(height, max(1, min(TILE_ROWS, TILE_BYTES // (width * self.wide.itemsize)))):
            yield rows, self.weight_VD[rows].to(self.product).to(self.wide)

    def _spans(self) -> Iterator[slice]:
        """The vocabulary as a span of aligned length and the rest, without an empty one."""
        height = self.weight_VD.shape[0]
        aligned = height - height % ALIGNED_ROWS
        for span in (slice(0, aligned), slice(aligned, height)):
            if span.stop > span.start:
                yield span

    def project_(self, hidden_CD: Tensor, out_CW: Tensor, student_CW: Tensor | None = None) -> Tensor:
        """out = hidden · headᵀ + bias, in the wide type; `BEYOND` in columns of out beyond the head's rows.

        student_CW: not read here; `TopLogProbs`, which can take a head's place, needs it.
        """
        self._project_(hidden_CD, out_CW)
        return out_CW if self.joined is None else self.joined.join_(out_CW)

    def part_(self, grad_CW: Tensor, hidden_CD: Tensor) -> None:
        """Turn the gradient with respect to `project_`'s result into that of the unjoined products, in place.

        hidden_CD: as given to `project_`.
        """
        if self.joined is None:
            return
        ids = list(self.joined.ids)
        own = Projection(
            self.weight_VD[ids], self.product, self.wide, None if self.bias_V is None else self.bias_V[ids]
        )
        products_CE = torch.empty(hidden_CD.shape[0], len(ids), dtype=self.wide, device=hidden_CD.device)
        self.joined.part_(grad_CW, own.project_(hidden_CD, products_CE))

    def _project_(self, hidden_CD: Tensor, out_CW: Tensor) -> Tensor:
        hidden_CD = hidden_CD.to(self.product)
        height = self.weight_VD.shape[0]
        if out_CW.shape[1] > height:
            out_CW[:, height:] = BEYOND
        if self.on_cuda:
            for span in self._spans():
                self._product(hidden_CD, self.weight_VD[span].T, out=out_CW[:, span])
                self._add_bias_(out_CW, span)
            return out_CW
        if not out_CW.numel():
            return out_CW
        hidden_CD = hidden_CD.to(self.wide).contiguous()
        with self._precision():
            for rows, tile_TD in self._tiles():
                if self.onednn:
                    out_CW[:, rows] = _onednn(hidden_CD, tile_TD)
                else:
                    torch.mm(hidden_CD, tile_TD.T, out=out_CW[:, rows])
                self._add_bias_(out_CW, rows)
        return out_CW

    def _add_bias_(self, out_CW: Tensor, rows: slice) -> None:
        """Add the bias of some rows of the head to their logits."""
        if self.bias_V is not None:
            out_CW[:, rows].add_(self.bias_V[rows])

    def gradients_(
        self, grad_CW: Tensor, hidden_wanted: bool, hidden_CD: Tensor, total_VD: Tensor | None
    ) -> Tensor | None:
        """total += gradᵀ · hidden if a total is given; returns grad · head [C, D] if wanted. In the wide type.

        grad_CW may be padded like rows of logits, and on CUDA be in the product type already.
        """
        if self.on_cuda:
            return self._cuda_gradients_(grad_CW, hidden_wanted, hidden_CD, total_VD)
        grad_CV = grad_CW[:, : self.weight_VD.shape[0]]
        if self.onednn and grad_CV.numel():
            return self._tiled_gradients_(grad_CV, hidden_wanted, hidden_CD, total_VD)
        with self._precision():
            if total_VD is not None:
                total_VD.addmm_(grad_CV.T, hidden_CD.to(self.wide))
            return self._hidden_gradient(grad_CV) if hidden_wanted else None

    def _cuda_gradients_(
        self, grad_CW: Tensor, hidden_wanted: bool, hidden_CD: Tensor, total_VD: Tensor | None
    ) -> Tensor | None:
        # Cast once for both products, with the padding: a copy of a slice would lose the rows' alignment.
        grad_CW, hidden_CD = grad_CW.to(self.product), hidden_CD.to(self.product)
        sum_CD = None
        for span in self._spans():
            grad_CV = grad_CW[:, span]
            if total_VD is not None:
                self._add_product_(total_VD[span], grad_CV.T, hidden_CD)
            if hidden_wanted and sum_CD is None:
                sum_CD = self._product(grad_CV, self.weight_VD[span])
            elif sum_CD is not None:
                self._add_product_(sum_CD, grad_CV, self.weight_VD[span])
        return sum_CD

    def _product(self, left_MK: Tensor, right_KN: Tensor, out: Tensor | None = None) -> Tensor:
        """left · right on CUDA, in the wide type."""
        if self.direct:
            return torch.mm(left_MK, right_KN, out=out)
        if out is None:
            return torch.mm(left_MK, right_KN, out_dtype=self.wide)
        return torch.mm(left_MK, right_KN, out_dtype=self.wide, out=out)

    def _add_product_(self, total_MN: Tensor, left_MK: Tensor, right_KN: Tensor) -> None:
        """total += left · right on CUDA, in the wide type."""
        if self.direct:
            total_MN.addmm_(left_MK, right_KN)
        else:
            torch.addmm(total_MN, left_MK, right_KN, out_dtype=self.wide, out=total_MN)

    def _tiled_gradients_(
        self, grad_CV: Tensor, hidden_wanted: bool, hidden_CD: Tensor, total_VD: Tensor | None
    ) -> Tensor | None:
        """Both products of a tile while it is in cache: the chunk's gradient is read from memory once."""
        sum_CD = torch.zeros_like(hidden_CD) if hidden_wanted else None
        hidden_DC = hidden_CD.T.contiguous()
        for rows, tile_TD in self._tiles():
            grad_CT = grad_CV[:, rows].contiguous()
            if sum_CD is not None:
                sum_CD.add_(_onednn(grad_CT, tile_TD.T))
            if total_VD is not None:
                total_VD[rows].add_(_onednn(grad_CT.T.contiguous(), hidden_DC))
        return sum_CD

    def _hidden_gradient(self, grad_CV: Tensor) -> Tensor:
        if self.weight_VD.dtype == self.product == torch.bfloat16:
            # One sum over the whole vocabulary, in fp32; the result is rounded once, as the gradient itself will be.
            return torch.mm(grad_CV.to(self.product), self.weight_VD).to(self.wide)
        sum_CD = grad_CV.new_zeros(grad_CV.shape[0], self.weight_VD.shape[1])
        for rows, tile_TD in self._tiles():
            # Sum each tile separately. For few rows, MKL's `addmm_` would add one product after another onto the
            # running sum: over 150,000 tokens that is off by 1e-5.
            sum_CD.add_(torch.mm(grad_CV[:, rows], tile_TD))
        return sum_CD
