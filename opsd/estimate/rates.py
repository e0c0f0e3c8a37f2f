"""How fast this machine is at the main operations of a step: matrix products, and reading memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
from torch.nn import functional

Clock = Callable[[], float]
CPU = torch.device("cpu")


def product_rate(
    shapes: Iterable[tuple[int, int]],
    tokens: int,
    seconds: float,
    clock: Clock = time.perf_counter,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> float:
    """GFLOP/s of the best product [tokens, D] · Wᵀ with a W [rows, D] of `shapes`; measured for `seconds` each.

    On a CPU both torch's products and oneDNN's, which sampling uses in fp32. clock: returns seconds, of any kind.
    """
    products: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [functional.linear]
    if device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        products.append(lambda x, w: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""))
    best = 0.0
    for rows, columns in shapes:
        x, w = (torch.ones(size, columns, device=device, dtype=dtype) for size in (tokens, rows))
        for product in products:
            spent = fastest(lambda x=x, w=w, product=product: product(x, w), seconds / len(products), clock, device)
            best = max(best, 2e-9 * tokens * rows * columns / spent)
    return best


def read_rate(seconds: float, clock: Clock = time.perf_counter, device: torch.device = CPU) -> float:
    """GB/s at which memory is read, by a sum over 256 MB."""
    memory = torch.ones(64 * 2**20, device=device)
    return 1e-9 * memory.nbytes / fastest(memory.sum, seconds, clock, device)


def fastest(act: Callable[[], object], seconds: float, clock: Clock, device: torch.device = CPU) -> float:
    """Seconds of the fastest of several calls, by `clock`, after a warm-up call."""

    def call() -> None:
        act()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    call()
    spent, end = [], time.perf_counter() + seconds
    while not spent or time.perf_counter() < end:
        start = clock()
        call()
        spent.append(clock() - start)
    return max(min(spent), 1e-9)
