"""The element-wise work on rows of logits with the kernels of `triton_kernels.py`; `rows.py` decides when.

Never imported without triton. Legend: C rows, W width of a row (`row_width`).
"""

# Only Triton knows the arguments of a kernel launch.
# pyrefly: ignore-errors[bad-argument-count, bad-argument-type, bad-keyword-argument, unexpected-keyword]

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from opsd.distill.divergence import likeliest, logits_
from opsd.distill.inputs import LossSpec
from opsd.distill.logits import Logits
from opsd.distill.triton_kernels import (
    GRADIENT_BLOCK,
    NAMES,
    STAGES,
    STATISTICS_BLOCK,
    WARPS,
    gradient_kernel,
    jsd_kernel,
    norm_kernel,
    statistics_kernel,
)
from opsd.types import Transform

EOPD_READS = ("reverse_kl", "forward_kl", "teacher_entropy")


def token_fields(
    needs: frozenset[str], logits: Logits, temperature: float, token_ids_C: Tensor | None
) -> dict[str, Tensor]:
    """Like `rows.score_`; the logits are not changed."""
    with torch.cuda.device_of(logits.student_CW):
        pair = _Pair(logits, temperature)
        row, found = _fields(pair, needs, token_ids_C)
        return found | _of_few_tokens(logits, temperature, row, needs, token_ids_C)


def _fields(pair: _Pair, needs: frozenset[str], token_ids_C: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """The output of pass 1, and the fields that kernels compute."""
    row = pair.statistics(token_ids_C if "teacher_rank_N" in needs else None)
    found = {name: row[NAMES.index(name)] for name in needs & set(NAMES)}
    if "top1_agree_N" in found:
        found["top1_agree_N"] = found["top1_agree_N"] > 0.5
    if "teacher_rank_N" in found:
        found["teacher_rank_N"] = found["teacher_rank_N"].to(torch.int64)
    if "grad_norm_N" in needs:
        found["grad_norm_N"] = pair.gradient_norms(row)
    return row, found


def _of_few_tokens(
    logits: Logits, temperature: float, row: Tensor, needs: frozenset[str], token_ids_C: Tensor | None
) -> dict[str, Tensor]:
    """The fields that read a few logits per row: torch's operations, with the sums of pass 1."""
    found: dict[str, Tensor] = {}
    height, (student, teacher) = logits.work.vocab_size, logits.work.transforms
    if not needs & {"teacher_mass_N", "log_ratio_N"} or logits.teacher_CW is None:
        return found
    (student_max_C, student_sum_C), (teacher_max_C, teacher_sum_C) = (
        (row[NAMES.index(f"{model}_max")], row[NAMES.index(f"{model}_sum")]) for model in ("student", "teacher")
    )

    def picked(products_CW: Tensor, ids_CK: Tensor, transform: Transform) -> Tensor:
        return logits_(products_CW.gather(-1, ids_CK), transform, ids_CK.shape[1], temperature)

    if "teacher_mass_N" in needs:
        # The transform from products to logits keeps their order.
        support_CK = likeliest(logits.student_CW[:, :height])
        exp_CK = (picked(logits.teacher_CW, support_CK, teacher) - teacher_max_C[:, None]).exp()
        found["teacher_mass_N"] = exp_CK.sum(-1) / teacher_sum_C
    if "log_ratio_N" in needs:
        assert token_ids_C is not None
        ids_C1 = token_ids_C[:, None]
        log_q_C = picked(logits.teacher_CW, ids_C1, teacher)[:, 0] - teacher_max_C - teacher_sum_C.log()
        log_p_C = picked(logits.student_CW, ids_C1, student)[:, 0] - student_max_C - student_sum_C.log()
        found["log_ratio_N"] = log_q_C - log_p_C
    return found


def gradient_(logits: Logits, spec: LossSpec, scale_C: Tensor, out_CW: Tensor) -> Tensor:
    """The divergences [C] in nats. out = scale times the gradient with respect to the logits over the temperature,
    through the cap.

    out_CW: of any floating type; it may be the student's products themselves if no rows are picked.
    """
    with torch.cuda.device_of(logits.student_CW):
        return _differentiate_(_Pair(logits, spec.temperature), spec, scale_C, out_CW)


def _differentiate_(pair: _Pair, spec: LossSpec, scale_C: Tensor, out_CW: Tensor) -> Tensor:
    row, beta = pair.statistics(None), spec.beta
    jsd = row
    if spec.divergence == "jsd":
        jsd = pair.jsd_sums(row, beta)
        mixing = -beta * math.log(beta) - (1.0 - beta) * math.log1p(-beta)
        loss_C = (mixing - beta * jsd[1] - (1.0 - beta) * jsd[0]).clamp_min_(0.0)
        scale_C = scale_C * (1.0 - beta)
    elif spec.divergence == "eopd":
        reverse_C, forward_C, teacher_C = (row[NAMES.index(f"{name}_N")] for name in EOPD_READS)
        jsd = (teacher_C > spec.parameter).to(row.dtype)
        loss_C = reverse_C + jsd * forward_C
    else:
        loss_C = row[NAMES.index(f"{spec.divergence}_N")]
    pair.gradient(spec, row, jsd, scale_C, out_CW)
    return loss_C


class _Pair:
    """Both models' products and transforms as arguments of the kernels, with a method to launch each kernel."""

    def __init__(self, logits: Logits, temperature: float) -> None:
        student_CW, work = logits.student_CW, logits.work
        teacher_CW = student_CW if logits.teacher_CW is None else logits.teacher_CW
        assert student_CW.stride() == teacher_CW.stride() and student_CW.stride(1) == 1
        self.rows, self.inv_temp = logits.rows, 1.0 / temperature
        self.has_teacher = logits.teacher_CW is not None
        first = torch.arange(self.rows, device=student_CW.device)
        picked = (logits.kept_C, logits.teacher_kept_C)
        self.at = student_CW, teacher_CW, *(first if rows is None else rows.contiguous() for rows in picked)
        self.shape = self.rows, student_CW.shape[1], work.vocab_size, student_CW.stride(0)
        student, teacher = work.transforms
        self.factors = *_factors(student, temperature), *_factors(teacher, temperature)
        self.how = {"S_CAPPED": student.softcap is not None, "T_CAPPED": teacher.softcap is not None}

    def statistics(self, token_ids_C: Tensor | None) -> Tensor:
        """Pass 1: [11, C], in the order of NAMES."""
        row = self._empty(len(NAMES))
        if not self.rows:
            return row
        ids_C = self.at[2] if token_ids_C is None else token_ids_C.contiguous()
        statistics_kernel[(self.rows,)](
            *self.at, ids_C, row, *self.shape, *self.factors,
            TEACHER=self.has_teacher, RANKED=token_ids_C is not None, **self.how,
            BLOCK=STATISTICS_BLOCK, STAGES=STAGES, num_warps=WARPS,
        )  # fmt: skip
        return row

    def gradient_norms(self, row: Tensor) -> Tensor:
        norm_C = self._empty()
        if self.rows:
            norm_kernel[(self.rows,)](
                *self.at, row, norm_C, *self.shape, *self.factors, self.inv_temp, **self.how,
                BLOCK=STATISTICS_BLOCK, STAGES=STAGES, num_warps=WARPS,
            )  # fmt: skip
        return norm_C

    def jsd_sums(self, row: Tensor, beta: float) -> Tensor:
        sums = self._empty(2)
        if self.rows:
            jsd_kernel[(self.rows,)](
                *self.at, row, sums, *self.shape, *self.factors, _logit(beta), **self.how,
                BLOCK=STATISTICS_BLOCK, STAGES=STAGES, num_warps=WARPS,
            )  # fmt: skip
        return sums

    def gradient(self, spec: LossSpec, row: Tensor, jsd: Tensor, scale_C: Tensor, out_CW: Tensor) -> None:
        """Pass 2."""
        assert out_CW.stride(1) == 1
        if self.rows:
            # Other divergences allow a beta of 0 or 1, and do not read it.
            logit_beta = _logit(spec.beta) if spec.divergence == "jsd" else 0.0
            gradient_kernel[(self.rows, triton.cdiv(self.shape[1], GRADIENT_BLOCK))](
                *self.at, row, jsd, scale_C.contiguous(), out_CW,
                *self.shape, out_CW.stride(0), *self.factors, logit_beta,
                DIVERGENCE=spec.divergence, **self.how, BLOCK=GRADIENT_BLOCK, num_warps=WARPS,
            )  # fmt: skip

    def _empty(self, *lines: int) -> Tensor:
        return torch.empty(*lines, self.rows, dtype=torch.float32, device=self.at[0].device)


def _factors(transform: Transform, temperature: float) -> tuple[float, float]:
    """inner and outer of logits over the temperature: outer·x, or outer·tanh(inner·x) under a cap."""
    if transform.softcap is None:
        return 1.0, transform.scale / temperature
    return transform.scale / transform.softcap, transform.softcap / temperature


def _logit(beta: float) -> float:
    return math.log(beta) - math.log1p(-beta)
