"""The four matrix products of the loss, with fp32 accumulation whatever the input type.

On CUDA half-precision inputs go to the tensor cores and the result comes out in fp32 (`out_dtype`). CPUs have no such
product in torch, and a bf16 result would round the logits. There the head is widened one tile of rows at a time, and
oneDNN is allowed to multiply in bf16: what was bf16 before comes through unrounded, and sums and results stay fp32.
fp32 products go to oneDNN too where the processor has AVX-512: torch's own `mm` uses MKL, which takes
half as long a vector on processors of other makers than its own (docs/performance.md has the numbers).

Rows of logits may be wider than the vocabulary (`row_width`). What is beyond it is filled so that no softmax notices,
and enters no product: rows of a head above the shared vocabulary may hold anything.

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

# What a CPU multiplies of the head at once: in wide precision a tile, and the chunk's logits over it, stay in cache
# until they are used.
TILE_BYTES = 8 * 2**20
TILE_ROWS = 1024
# On CUDA a product over the vocabulary takes a multiple of this in one go, and what is left in another: kernels for the
# tensor cores read several entries at a time.
ALIGNED_ROWS = 64
# The logits beyond the vocabulary: exp of it is 0 beside any logit, and unlike -inf it has a difference with itself.
BEYOND = -1e30
ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def product_dtype(hidden: Tensor, head: Tensor) -> torch.dtype:
    """The type products are taken in: autocast's where it is on, else the wider of the two inputs'."""
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
    """Tokens that count as one: its chance is the sum of theirs. The first one's column stands for it.

    temperature: what the products are divided by on their way to log-probabilities.
    """

    ids: tuple[int, ...]
    temperature: float = 1.0

    def join_(self, products_CW: Tensor) -> Tensor:
        """T·ln Σ exp(x/T) of these tokens in the first one's column, and no chance for the others."""
        first, *rest = self.ids
        own_EC = torch.stack([products_CW[:, token] for token in self.ids])
        products_CW[:, first] = torch.logsumexp(own_EC / self.temperature, 0) * self.temperature
        for token in rest:
            products_CW[:, token] = BEYOND
        return products_CW

    def part_(self, grad_CW: Tensor, products_CE: Tensor) -> None:
        """Spread the gradient of the one token over them all, by their own products: the chain rule of `join_`."""
        whole_C = grad_CW[:, self.ids[0]].clone()
        share_CE = torch.softmax(products_CE / self.temperature, -1)
        for place, token in enumerate(self.ids):
            grad_CW[:, token] = whole_C * share_CE[:, place]


class Projection:
    """A head's weight [V, D] read in `product` precision, with results in `wide` precision, and its bias [V] if any.

    Holds no copy of the weight, except where CUDA needs it cast. joined: tokens whose logits come out as one.
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
        # CUDA has no use for a setting of the CPU's products, which is the whole process's.
        return bf16_products() if self.product == torch.bfloat16 and not self.on_cuda else nullcontext()

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the vocabulary with their rows, rounded to the product type and widened."""
        height, width = self.weight_VD.shape
        for rows in slices(height, max(1, min(TILE_ROWS, TILE_BYTES // (width * self.wide.itemsize)))):
            yield rows, self.weight_VD[rows].to(self.product).to(self.wide)

    def _spans(self) -> Iterator[slice]:
        """The vocabulary in a part of aligned length and the rest, leaving out one that is empty."""
        height = self.weight_VD.shape[0]
        aligned = height - height % ALIGNED_ROWS
        for span in (slice(0, aligned), slice(aligned, height)):
            if span.stop > span.start:
                yield span

    def project_(self, hidden_CD: Tensor, out_CW: Tensor, student_CW: Tensor | None = None) -> Tensor:
        """out = hidden · headᵀ + bias, in the wide type; `BEYOND` in what out has beyond the head's rows.

        student_CW: for a teacher of few log-probabilities alone, which stands in a head's place.
        """
        self._project_(hidden_CD, out_CW)
        return out_CW if self.joined is None else self.joined.join_(out_CW)

    def part_(self, grad_CW: Tensor, hidden_CD: Tensor) -> None:
        """Turn the gradient by what `project_` gave into that by the head's own; hidden_CD: as given there."""
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
        """To the logits of some rows of the head."""
        if self.bias_V is not None:
            out_CW[:, rows].add_(self.bias_V[rows])

    def gradients_(
        self, grad_CW: Tensor, hidden_wanted: bool, hidden_CD: Tensor, total_VD: Tensor | None
    ) -> Tensor | None:
        """total += gradᵀ · hidden where a total is given; returns grad · head [C, D] where wanted. In the wide type.

        The gradient may be as wide as rows of logits are, and on CUDA in the product type already.
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
        # Cast once for both products, and whole: of a slice the copy would have rows as short as the vocabulary.
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
            # A sum of its own for each tile. For a few rows MKL adds one product after another, onto the sum so far
            # under `addmm_`: over 150,000 tokens that is off by 1e-5.
            sum_CD.add_(torch.mm(grad_CV[:, rows], tile_TD))
        return sum_CD
