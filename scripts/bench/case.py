"""One case of the loss benchmark: a fresh process that imports, makes inputs, and measures (`bench/meter.py`).

`bench_loss.py` starts it with a case as JSON and reads a JSON object from its last line.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor

from bench.baselines import BASELINES, Unavailable
from bench.meter import measure, timed
from opsd.distill import distill_loss
from opsd.selection import load_selector


@dataclass(frozen=True)
class Case:
    """What is measured. method: "ours", "rate" (the machine's own matrix products) or a key of BASELINES.

    tokens N, vocab V, width of the student, and of the teacher if it differs; selector and retention as in
    `load_selector`; chunk in tokens. threads: CPU threads.
    """

    method: str
    tokens: int
    width: int
    dtype: str = "float32"
    selector: str = "all"
    retention: float = 1.0
    divergence: str = "reverse_kl"
    chunk: int | Literal["auto"] = 256
    vocab: int = 151_936
    threads: int = 2
    teacher_width: int | None = None
    device: str = "cpu"

    @property
    def widths(self) -> tuple[int, int]:
        """Hidden sizes of the student and the teacher."""
        return self.width, self.teacher_width or self.width

    @property
    def rows(self) -> int:
        """Tokens of a chunk, for measurements that cannot choose them."""
        return 256 if self.chunk == "auto" else self.chunk

    @property
    def flop(self) -> float:
        """Multiplications and additions that the case's matrix products need, without recomputed ones.

        A product of all tokens with a head is 2·N·V·D. Scoring takes the student's, and the teacher's if the rule reads
        it; then each kept token takes two projections, and two gradients (of the student only).
        """
        student, teacher = (2.0 * self.tokens * self.vocab * width for width in self.widths)
        kept = 1.0 if self.selector == "all" else self.retention
        scored = 0.0 if self.selector in ("all", "random") else student
        scored += 0.0 if self.selector in ("all", "random", "entropy", "entropy_sample") else teacher
        return scored + kept * (3 * student + teacher)


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
    models = inputs_of(case)
    leaves, loss = models[:2], find_loss(case)

    def run() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        loss_sum = loss(*models)
        loss_sum.backward()
        return loss_sum.detach()

    found = measure(run, torch.device(case.device))
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    return {
        "seconds": found.seconds,
        "cpu_seconds": found.cpu_seconds,
        "peak_gib": (found.peak_bytes - gradients) / 2**30,
        "nats_per_token": found.value / case.tokens,
    }


def inputs_of(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The student's hidden states and head, which require gradients, and the teacher's.

    Logits have a standard deviation of 2, like those of a language model at its less certain tokens.
    """

    def drawn(rows: int, width: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(rows, width, device=case.device) * scale).to(getattr(torch, case.dtype))

    hidden_ND, hidden_NE = (drawn(case.tokens, width) for width in case.widths)
    head_VD, head_VE = (drawn(case.vocab, width, 2 * width**-0.5) for width in case.widths)
    return hidden_ND.requires_grad_(), head_VD.requires_grad_(), hidden_NE, head_VE


def find_loss(case: Case) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The method as a function of the two models' hidden states and heads that gives a loss sum."""
    if case.method != "ours":
        return BASELINES[case.method](case.divergence, case.rows)
    options = {} if case.selector == "all" else {"retention": case.retention}
    selector = load_selector(case.selector, **options)
    return lambda *models: (
        distill_loss(*models, selector=selector, divergence=case.divergence, chunk_tokens=case.chunk).loss_sum  # pyrefly: ignore[bad-argument-type]
    )


def measure_rate(case: Case) -> dict[str, Any]:
    """Floating-point operations per second of this machine's matrix products at the loss's own shapes.

    mm: torch's product in the case's dtype, the mean over the four products of the loss. best: the highest of those
    and of a square one, with any library; this is what the machine can do.
    """
    dtype, device = getattr(torch, case.dtype), torch.device(case.device)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    hidden_CD, head_TD, grad_CT, square = (
        drawn(*shape) for shape in ((case.rows, case.width), (32_768, case.width), (case.rows, 32_768), (2048, 2048))
    )
    chunk_flop = 2.0 * grad_CT.numel() * case.width
    # Into existing tensors: with a fresh one, the time would include the page faults of its allocation.
    logits_CT, sum_CD, total_TD, squared = (torch.zeros_like(like) for like in (grad_CT, hidden_CD, head_TD, square))
    products: dict[str, tuple[float, Callable[[], Tensor]]] = {
        "logits": (chunk_flop, lambda: torch.mm(hidden_CD, head_TD.T, out=logits_CT)),
        "hidden": (chunk_flop, lambda: torch.mm(grad_CT, head_TD, out=sum_CD)),
        "head": (chunk_flop, lambda: torch.mm(grad_CT.T, hidden_CD, out=total_TD)),
        "square": (2.0 * 2048**3, lambda: torch.mm(square, square, out=squared)),
    }
    if device.type == "cpu":
        linear = torch.ops.mkldnn._linear_pointwise
        products["square_onednn"] = (2.0 * 2048**3, lambda: linear(square, square, None, "none", [], ""))
    rates = {}
    for name, (flop, product) in products.items():
        product()
        runs = [timed(product, device) for _ in range(3)]
        # On a GPU its own seconds; on a CPU the processor seconds of all threads, divided by their number.
        best = min(run.seconds if device.type == "cuda" else run.cpu_seconds / case.threads for run in runs)
        rates[name] = flop / 1e9 / best
    mm = 4 / (2 / rates["logits"] + 1 / rates["hidden"] + 1 / rates["head"])
    return {"mm_gflops": mm, "best_gflops": max(rates.values()), "rates_gflops": rates}


if __name__ == "__main__":
    main()
