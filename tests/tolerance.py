"""How far two floating-point results may lie apart: one rule for every such comparison of the suite."""

import math
from typing import Any

import numpy as np
import torch

# Unit roundoff: how far, relative to a value, rounding to the nearest number of a type moves it at most.
ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
# A rounding is off by u/√3 in the quadratic mean, and the largest of a million random errors lies five standard
# deviations out: 3 u. Twice that, as a term is rounded itself (a product, an exponential) before it is added; and twice
# again, as what is added up reaches further than what comes out.
MARGIN = 12.0
# A comparison must see a relative fault of 1e-4, and see it clearly.
MOST = 5e-5


def rounding(*sums: int, dtype: torch.dtype = torch.float32) -> float:
    """How far a result may be off, relative to the size of what was added up, after these sums one behind another.

    sums: the number of terms of each sum on the way to the result (1 for a step without a sum). Libraries add n terms
    in about √n blocks of √n, vector lane by vector lane, so a term goes through about 2·√n additions, in an order that
    depends on the processor. Their errors are independent with mean 0 and add up as a random walk: k additions are off
    by about u·√k, not by the u·k of the worst case (Higham and Mary 2019, "A new approach to probabilistic rounding
    error analysis"; Blanchard, Higham and Mary 2020, "A class of fast and accurate summation algorithms"). Hence
    MARGIN · u · √(Σ 2·√n).

    Size is what is added up, not what comes out: where terms cancel, or logits of 30 make a divergence of 0.1, the
    rounding is that of the terms.
    Errors: AssertionError for sums so long, or a type so coarse, that a fault of 1e-4 could pass.
    """
    relative = MARGIN * ROUNDOFF[dtype] * math.sqrt(sum(2.0 * math.sqrt(n) for n in sums))
    assert relative <= MOST, f"{relative:.2g} would let a fault of 1e-4 pass: compare sooner"
    return relative


def transformer(layers: int, width: int, backward: int = 0) -> tuple[int, ...]:
    """The sums on the way through a transformer's layers, and back again so many times.

    A layer has eleven: two norms, seven projections, attention's scores and their values. Back through it each
    projection is taken twice, for the input's gradient and the weight's; then the optimiser adds it.
    """
    return (width,) * (11 * layers * (1 + 2 * backward))


def close(
    found: Any,
    expected: Any,
    *sums: int,
    dtype: torch.dtype = torch.float32,
    size: float | None = None,
    cancels: bool = False,
    said: str = "",
) -> None:
    """Every element of found within `rounding(*sums)` of expected, relative to the largest magnitude expected.

    found, expected: tensors, arrays, numbers or lists of them, of one shape.
    size: the magnitude of what was added up, where it is larger. cancels: the result may vanish altogether, so that
    nothing can be seen relative to it; otherwise a size so far above the result that a fault of 1e-4 of it could pass
    is refused.
    """
    found, expected = _double(found), _double(expected)
    assert found.shape == expected.shape, f"{said} shapes {found.shape} and {expected.shape}"
    finite = np.isfinite(expected)
    assert (found[~finite] == expected[~finite]).all(), f"{said} not the infinities that were expected"
    found, expected = found[finite], expected[finite]
    assert np.isfinite(found).all(), f"{said} not finite"
    if not expected.size:
        return
    largest = float(np.abs(expected).max())
    allowed = rounding(*sums, dtype=dtype) * max(largest, size or 0.0)
    assert cancels or allowed <= MOST * largest, (
        f"{said} {allowed:.3g} allowed of {largest:.3g}: a fault of 1e-4 would pass"
    )
    worst = float(np.abs(found - expected).max())
    assert worst <= allowed, f"{said} off by {worst:.3g} of {largest:.3g}; {allowed:.3g} is what rounding may cost"


def close_numbers(found: dict[str, Any], expected: dict[str, Any], *sums: int) -> None:
    """A line of metrics: the same keys, every number within `rounding(*sums)` of its own size, or of 0.1 if smaller.

    0.1: fractions and nats that are nearly nothing are what is left of larger ones.
    """
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, float):
            close(found[name], value, *sums, size=0.1, cancels=True, said=name)
        else:
            assert found[name] == value, name


def _double(values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        return values.detach().double().numpy()
    return np.asarray(values, dtype=np.float64)
