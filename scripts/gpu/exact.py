"""Loss, gradients and statistics against their definitions in fp64, at the full vocabulary, on fresh inputs.

Legend: N tokens, V vocabulary, D and E hidden sizes; p = P_S, q = P_T.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bench.case import Case, inputs_of
from gpu.check import BF16_ERROR, FP32_ERROR, Check, Row, relative
from opsd.distill import distill_loss, token_stats
from opsd.selection import load_selector
from opsd.types import PLAIN, Head, Transform

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
# Each reads a different part of the held logits: the student's, or both models'.
SELECTORS = ("entropy", "soft_or")
TOKENS = 48
# Both models' scale and soft cap; logits are typically 2, at most about 8.
BENT = Transform(0.8, 4.0), Transform(1.3, 6.0)
# More than one chunk, and the last one not full.
CHUNK = 20


def exact(check: Check) -> None:
    """Every divergence, fused and whole; chosen tokens; statistics; in fp32 and bf16."""
    for vocab in check.sizes.vocabs:
        for dtype in ("float32", "bfloat16"):
            seed = time.time_ns() % 2**31
            torch.manual_seed(seed)
            student, teacher = check.sizes.widths
            case = Case("ours", TOKENS, student, dtype, vocab=vocab, teacher_width=teacher, device=str(check.device))
            bound = FP32_ERROR if dtype == "float32" else BF16_ERROR
            found = _Compared(inputs_of(case))
            about = {"vocab": vocab, "dtype": dtype, "seed": seed}
            for divergence in DIVERGENCES:
                for memory in ("fused", "whole"):
                    one = replace(found, divergence=divergence, memory=memory)
                    check.tried("loss and gradients", one.loss, bound, divergence=divergence, memory=memory, **about)
                bent = replace(found, divergence=divergence, transforms=BENT)
                check.tried("scales and soft caps", bent.loss, bound, divergence=divergence, **about)
            for rule in SELECTORS:
                check.tried("chosen tokens", replace(found, rule=rule).loss, bound, rule=rule, **about)
            check.tried("statistics", found.statistics, FP32_ERROR, **about)
            check.tried("their statistics", replace(found, transforms=BENT).statistics, FP32_ERROR, **about)


@dataclass(frozen=True)
class _Compared:
    """One loss on the tensors of both models, compared with its definition."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    divergence: str = "reverse_kl"
    memory: str = "fused"
    rule: str = "all"
    transforms: tuple[Transform, Transform] = (PLAIN, PLAIN)

    @property
    def models(self) -> tuple[Tensor, Head, Tensor, Head]:
        """The arguments of the loss core."""
        student_ND, head_VD, teacher_NE, head_VE = self.tensors
        ours, theirs = self.transforms
        return student_ND, Head(head_VD, transform=ours), teacher_NE, Head(head_VE, transform=theirs)

    @cached_property
    def leaves(self) -> tuple[Tensor, Tensor]:
        """The student's hidden states and head, in fp64."""
        student_ND, head_VD = (tensor.detach().double().requires_grad_() for tensor in self.tensors[:2])
        return student_ND, head_VD

    def log_probs(self) -> tuple[Tensor, Tensor]:
        """log p and log q [N, V]."""
        student_ND, head_VD = self.leaves
        teacher_NE, head_VE = (tensor.double() for tensor in self.tensors[2:])
        ours, theirs = self.transforms
        return ours(student_ND @ head_VD.T).log_softmax(-1), theirs(teacher_NE @ head_VE.T).log_softmax(-1)

    def loss(self) -> Row:
        """Errors of the loss and the gradients, over the tokens that were chosen."""
        options: dict[str, Any] = {"divergence": self.divergence, "memory": self.memory}
        if self.rule == "all":
            options["chunk_tokens"] = CHUNK
        else:
            options["selector"] = load_selector(self.rule, retention=0.5)
        found = distill_loss(*self.models, **options)
        ours = torch.autograd.grad(found.loss_sum, self.tensors[:2])
        loss_sum = nats(self.divergence, *self.log_probs())[found.kept_N].sum()
        of_ND, of_VD = torch.autograd.grad(loss_sum, self.leaves)
        return {
            "loss_error": relative(found.loss_sum.detach(), loss_sum.detach()),
            "hidden_gradient_error": relative(ours[0], of_ND),
            "head_gradient_error": relative(ours[1], of_VD),
        }

    @torch.no_grad()
    def statistics(self) -> Row:
        """Error of each statistic, over all tokens."""
        log_p_NV, log_q_NV = self.log_probs()
        expected = {
            "entropy_N": -(log_p_NV.exp() * log_p_NV).sum(-1),
            "teacher_entropy_N": -(log_q_NV.exp() * log_q_NV).sum(-1),
            "reverse_kl_N": nats("reverse_kl", log_p_NV, log_q_NV),
            "forward_kl_N": nats("forward_kl", log_p_NV, log_q_NV),
        }
        found = token_stats(*self.models, needs=frozenset(expected), chunk_tokens=CHUNK)
        return {f"{name[:-2]}_error": relative(getattr(found, name), of_N) for name, of_N in expected.items()}


def nats(divergence: str, log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """A divergence [N] by its definition; the JSD with equal weights."""
    if divergence == "reverse_kl":
        return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)
    if divergence == "forward_kl":
        return (log_q_NV.exp() * (log_q_NV - log_p_NV)).sum(-1)
    log_m_NV = torch.logaddexp(log_p_NV, log_q_NV) - math.log(2.0)
    return 0.5 * (nats("reverse_kl", log_p_NV, log_m_NV) + nats("reverse_kl", log_q_NV, log_m_NV))
