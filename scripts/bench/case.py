"""One case of the loss benchmark, cold: a fresh process that imports, makes inputs, and times the first call.

`bench_loss.py` starts it with a case as JSON and reads a JSON object from its last line.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor

from bench.baselines import BASELINES, Unavailable
from opsd.distill import distill_loss
from opsd.selection import load_selector


@dataclass(frozen=True)
class Case:
    """What is measured. method: "ours", "rate" (the machine's own matrix products) or a key of BASELINES.

    tokens N, width D of both models, vocab V; selector and retention as in `load_selector`; chunk in tokens.
    """

    method: str
    tokens: int
    width: int
    dtype: str = "float32"
    selector: str = "all"
    retention: float = 1.0
    divergence: str = "reverse_kl"
    chunk: int = 256
    vocab: int = 151_936
    threads: int = 2

    @property
    def flop(self) -> float:
        """Multiplications and additions that the case's matrix products need, recomputed ones not counted.

        A product of all tokens with a head is 2·N·V·D. Scored: the student's, and the teacher's where the rule reads
        it; then for each kept token two projections and two gradients.
        """
        product = 2.0 * self.tokens * self.vocab * self.width
        scored = {"all": 0, "random": 0, "entropy": 1, "entropy_sample": 1}.get(self.selector, 2)
        return product * (scored + 4 * (1.0 if self.selector == "all" else self.retention))


def main() -> None:
    """Run the case given as JSON and print what was measured as JSON."""
    case = Case(**json.loads(sys.argv[1]))
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    try:
        measured = measure_rate(case) if case.method == "rate" else measure_loss(case)
    except Unavailable as error:
        measured = {"missing": str(error)}
    print(json.dumps({**dataclasses.asdict(case), "gflop": case.flop / 1e9, **measured}))


def measure_loss(case: Case) -> dict[str, Any]:
    """Seconds of loss and backward together, and their peak memory above inputs and gradients in GiB."""
    dtype = getattr(torch, case.dtype)
    student_ND, teacher_ND = (torch.randn(case.tokens, case.width).to(dtype) for _ in range(2))
    # Logits with a standard deviation of 2, as wide as those of a language model's less certain tokens.
    heads = [(torch.randn(case.vocab, case.width) * (2 * case.width**-0.5)).to(dtype) for _ in range(2)]
    leaves = (student_ND.requires_grad_(), heads[0].requires_grad_())
    loss = find_loss(case)
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    reset_peak()
    resident = status_bytes("VmRSS")
    seconds, cpu_seconds, value = timed(lambda: run_backward(loss(*leaves, teacher_ND, heads[1])))
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_gib": (status_bytes("VmHWM") - resident - gradients) / 2**30,
        "nats_per_token": value / case.tokens,
    }


def find_loss(case: Case) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The method as a function of the two models' hidden states and heads that gives a loss sum."""
    if case.method != "ours":
        return BASELINES[case.method](case.divergence, case.chunk)
    options = {} if case.selector == "all" else {"retention": case.retention}
    selector = load_selector(case.selector, **options)
    return lambda *models: (
        distill_loss(*models, selector=selector, divergence=case.divergence, chunk_tokens=case.chunk).loss_sum  # pyright: ignore[reportArgumentType]
    )


def run_backward(loss_sum: Tensor) -> float:
    loss_sum.backward()
    return float(loss_sum.detach())


def measure_rate(case: Case) -> dict[str, Any]:
    """Floating-point operations a second of this machine's matrix products at the loss's own shapes.

    mm: torch's product of the case's type, the mean over the four products of the loss. best: the highest of those
    and of a square one, by whichever library; this is what the machine can do.
    """
    dtype = getattr(torch, case.dtype)
    hidden_CD = torch.randn(case.chunk, case.width).to(dtype)
    head_TD = torch.randn(32_768, case.width).to(dtype)
    grad_CT = torch.randn(case.chunk, 32_768).to(dtype)
    square = torch.randn(2048, 2048).to(dtype)
    linear = torch.ops.mkldnn._linear_pointwise
    chunk_flop = 2.0 * grad_CT.numel() * case.width
    # Into tensors that are there already: a fresh one would be timed with the kernel's making of its pages.
    logits_CT, sum_CD, total_TD, squared = (torch.zeros_like(like) for like in (grad_CT, hidden_CD, head_TD, square))
    products: dict[str, tuple[float, Callable[[], Tensor]]] = {
        "logits": (chunk_flop, lambda: torch.mm(hidden_CD, head_TD.T, out=logits_CT)),
        "hidden": (chunk_flop, lambda: torch.mm(grad_CT, head_TD, out=sum_CD)),
        "head": (chunk_flop, lambda: torch.mm(grad_CT.T, hidden_CD, out=total_TD)),
        "square": (2.0 * 2048**3, lambda: torch.mm(square, square, out=squared)),
        "square_onednn": (2.0 * 2048**3, lambda: linear(square, square, None, "none", [], "")),
    }
    rates = {}
    for name, (flop, product) in products.items():
        product()
        runs = [timed(lambda product=product: float(product()[0, 0])) for _ in range(3)]
        rates[name] = flop / 1e9 / min(cpu for _, cpu, _ in runs) * case.threads
    mm = 4 / (2 / rates["logits"] + 1 / rates["hidden"] + 1 / rates["head"])
    return {"mm_gflops": mm, "best_gflops": max(rates.values()), "rates_gflops": rates}


def timed(run: Callable[[], float]) -> tuple[float, float, float]:
    """Wall seconds, processor seconds over all threads, and the result."""
    wall, cpu = time.perf_counter(), time.process_time()
    value = run()
    return time.perf_counter() - wall, time.process_time() - cpu, value


def reset_peak() -> None:
    """Let the kernel's record of peak memory start anew."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def status_bytes(field: str) -> int:
    """A memory field of this process, as the kernel counts it."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
