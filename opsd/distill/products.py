"""The four matrix products of the loss, with fp32 accumulation whatever the input type.

On CUDA half-precision inputs go to the tensor cores and the result comes out in fp32 (`out_dtype`). CPUs have no
such product, and a bf16 result would round the logits: there the head is widened one tile of rows at a time
and multiplied in fp32, which is exact for the inputs and keeps the copy small.

Legend: C rows of a chunk, V shared vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from opsd.distill.slices import slices

# What a CPU multiplies of the head at once, in wide precision: a tile stays in cache between widening and product.
TILE_BYTES = 8 * 2**20


def product_dtype(hidden: Tensor, head: Tensor) -> torch.dtype:
    """The type products are taken in: autocast's where it is on, else the wider of the two inputs'."""
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    return torch.promote_types(hidden.dtype, head.dtype)


class Head:
    """A vocabulary projection [V, D] read in `product` precision, with results in `wide` precision.

    Holds no copy of the weight, except where CUDA needs it cast.
    """

    def __init__(self, weight_VD: Tensor, product: torch.dtype, wide: torch.dtype) -> None:
        self.product, self.wide = product, wide
        self.on_cuda = weight_VD.is_cuda
        self.weight_VD = weight_VD.to(product) if self.on_cuda else weight_VD
        self.direct = self.weight_VD.dtype == product == wide

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the vocabulary with their rows, rounded to the product type and widened."""
        height, width = self.weight_VD.shape
        for rows in slices(height, max(1, TILE_BYTES // (width * self.wide.itemsize))):
            yield rows, self.weight_VD[rows].to(self.product).to(self.wide)

    def project_(self, hidden_CD: Tensor, out_CV: Tensor) -> Tensor:
        """out = hidden · headᵀ, in the wide type."""
        hidden_CD = hidden_CD.to(self.product)
        if not self.on_cuda:
            hidden_CD = hidden_CD.to(self.wide)
            for rows, tile_TD in self._tiles():
                torch.mm(hidden_CD, tile_TD.T, out=out_CV[:, rows])
            return out_CV
        if not self.direct:
            return torch.mm(hidden_CD, self.weight_VD.T, out_dtype=self.wide, out=out_CV)
        return torch.mm(hidden_CD, self.weight_VD.T, out=out_CV)

    def hidden_gradient(self, grad_CV: Tensor) -> Tensor:
        """grad · head [C, D], in the wide type."""
        if self.on_cuda and not self.direct:
            return torch.mm(grad_CV.to(self.product), self.weight_VD, out_dtype=self.wide)
        if self.direct:
            return torch.mm(grad_CV, self.weight_VD)
        total_CD = grad_CV.new_zeros(grad_CV.shape[0], self.weight_VD.shape[1])
        for rows, tile_TD in self._tiles():
            total_CD.addmm_(grad_CV[:, rows], tile_TD)
        return total_CD

    def add_weight_gradient_(self, grad_CV: Tensor, hidden_CD: Tensor, total_VD: Tensor) -> None:
        """total += gradᵀ · hidden, accumulated in the wide type."""
        if self.on_cuda and not self.direct:
            grad_VC, hidden_CD = grad_CV.to(self.product).T, hidden_CD.to(self.product)
            torch.addmm(total_VD, grad_VC, hidden_CD, out_dtype=self.wide, out=total_VD)
        else:
            total_VD.addmm_(grad_CV.T, hidden_CD.to(self.wide))
