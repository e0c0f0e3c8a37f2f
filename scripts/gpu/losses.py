"""Time and memory of the loss with its gradients at the paper's size, by rule, chunk and vocabulary, compared with
Liger's and TRL's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, replace

import torch

from bench.case import Case, find_loss, inputs_of, measure_loss
from gpu.check import FP32_ERROR, Check, Row

# The fields that distinguish the rows.
ABOUT = ("method", "selector", "retention", "divergence", "chunk", "vocab", "tokens")
RULES = (("soft_or", 0.5), ("soft_or", 0.2), ("entropy", 0.5), ("entropy", 0.2))
BASELINES = ("trl", "liger_triton", "liger")
# Liger's chunked loss needs a chunk size.
LIGER_CHUNK = 512


def losses(check: Check) -> None:
    """A row per case. Ours with the same loss must agree with the first one; others may round logits to bf16."""
    nats: dict[Case, float] = {}
    for case in cases(check):
        about = {name: asdict(case)[name] for name in ABOUT}
        bound = FP32_ERROR if case.method == "ours" else math.inf
        check.tried("loss", lambda case=case: _measured(case, nats), bound, **about)
    check.tried("kernels of the loss", lambda: _kernels(check, _plain(check)))


def cases(check: Check) -> Iterator[Case]:
    """Ours, at both vocabularies; other divergences, fewer tokens and baselines at the first."""
    plain = _plain(check)
    for vocab in check.sizes.vocabs:
        ours = replace(plain, vocab=vocab)
        yield from (replace(ours, chunk=chunk) for chunk in ("auto", *check.sizes.chunks))
        yield from (replace(ours, selector=rule, retention=retention) for rule, retention in RULES)
    yield from (replace(plain, divergence=divergence) for divergence in ("forward_kl", "jsd"))
    yield replace(plain, tokens=plain.tokens // 2)
    yield from (replace(plain, method=method, chunk=LIGER_CHUNK) for method in BASELINES)


def _plain(check: Check) -> Case:
    sizes = check.sizes
    student, teacher = sizes.widths
    case = Case("ours", sizes.tokens, student, "bfloat16", vocab=sizes.vocabs[0], chunk="auto")
    return replace(case, teacher_width=teacher, device=str(check.device))


def _measured(case: Case, nats: dict[Case, float]) -> Row:
    # The same inputs for every method.
    torch.manual_seed(0)
    found = measure_loss(case)
    first = nats.setdefault(replace(case, method="ours", chunk="auto"), found["nats_per_token"])
    return {
        "ms": 1e3 * found["seconds"],
        "peak_gib": found["peak_gib"],
        "tflops": case.flop / found["seconds"] / 1e12,
        "nats_per_token": found["nats_per_token"],
        "nats_error": abs(found["nats_per_token"] / first - 1.0),
    }


def _kernels(check: Check, case: Case) -> Row:
    models, loss = inputs_of(case), find_loss(case)
    return check.kernels(lambda: loss(*models).backward())
