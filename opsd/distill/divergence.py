"""The divergences and the token statistics as plain maths on two blocks of logits.

Every function works in place on buffers it is handed, one row a token, so that nothing here allocates in
proportion to the vocabulary. Rows are independent: a caller may cut a chunk into any blocks.

Legend: B rows of a block, V shared vocabulary. P_S student, P_T teacher; p = P_S, q = P_T; natural logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from opsd.errors import UserError

Divergence = Literal["reverse_kl", "forward_kl", "jsd"]
SCRATCH_BUFFERS = 2


def log_softmax_(logits_BV: Tensor, temperature: float) -> Tensor:
    """Turn logits into log-probabilities at `temperature`, in place."""
    if temperature != 1.0:
        logits_BV.div_(temperature)
    return torch.log_softmax(logits_BV, -1, out=logits_BV)


def temper_(temperature: float, *logits: Tensor | None) -> None:
    """Divide each of the logits that are given by the temperature, in place."""
    for logits_BV in logits if temperature != 1.0 else ():
        if logits_BV is not None:
            logits_BV.div_(temperature)


class Normaliser(NamedTuple):
    """A row's ln Σ exp(logit) [B], in two parts so that differences of it keep their digits, and its softmax's mass.

    largest_B: the largest logit. above_B: what ln Σ exp lies above it. mass_B: what torch's softmax sums to. It adds
    a row up in one go in fp32, which over 150,000 tokens is off by 1e-5; its results are to be divided by this.
    """

    largest_B: Tensor
    above_B: Tensor
    mass_B: Tensor


def softmax_(logits_BV: Tensor, out_BV: Tensor) -> Normaliser:
    """Probabilities times their mass into out_BV, which may be the logits."""
    largest_B = logits_BV.amax(-1)
    torch.softmax(logits_BV, -1, out=out_BV)
    mass_B = out_BV.sum(-1)
    # The largest one is 1 over torch's sum: no second pass of exponentials is needed to know that sum.
    return Normaliser(largest_B, (mass_B / out_BV.amax(-1)).log_(), mass_B)


def reverse_kl_(
    student_BV: Tensor, teacher_BV: Tensor, scratch_SBV: Tensor, beta: float = 0.5
) -> tuple[Tensor, Tensor]:
    """KL(P_S‖P_T). With r = log p − log q and kl = Σ p·r the gradient is p·(r − kl) (paper Eq. 1 and 3).

    The normalisers cancel in r − kl, so differences u of raw logits serve: p·(u − Σ p·u).
    """
    u_BV = torch.sub(student_BV, teacher_BV, out=scratch_SBV[0])
    student, teacher = softmax_(student_BV, student_BV), softmax_(teacher_BV, teacher_BV)
    p_BV = student_BV
    weighted_BV = u_BV.mul_(p_BV)
    mean_B = weighted_BV.sum(-1) / student.mass_B
    torch.addcmul(weighted_BV, p_BV, mean_B[:, None], value=-1.0, out=p_BV)
    kl_B = (mean_B - (student.largest_B - teacher.largest_B)) - (student.above_B - teacher.above_B)
    return kl_B.clamp_min_(0.0), student.mass_B


def forward_kl_(
    student_BV: Tensor, teacher_BV: Tensor, scratch_SBV: Tensor, beta: float = 0.5
) -> tuple[Tensor, Tensor]:
    """KL(P_T‖P_S), with gradient p − q."""
    u_BV = torch.sub(teacher_BV, student_BV, out=scratch_SBV[0])
    student, teacher = softmax_(student_BV, student_BV), softmax_(teacher_BV, teacher_BV)
    mean_B = u_BV.mul_(teacher_BV).sum(-1) / teacher.mass_B
    student_BV.addcmul_(teacher_BV, (student.mass_B / teacher.mass_B)[:, None], value=-1.0)
    kl_B = (mean_B - (teacher.largest_B - student.largest_B)) - (teacher.above_B - student.above_B)
    return kl_B.clamp_min_(0.0), student.mass_B


def jsd_(student_BV: Tensor, teacher_BV: Tensor, scratch_SBV: Tensor, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    """β·KL(P_T‖M) + (1−β)·KL(P_S‖M), M = β·P_T + (1−β)·P_S.

    The gradient is (1−β)·p·(a − Σ p·a) with a = log(p/M). With x = log q − log p + log(β/(1−β)), a is
    −softplus(x) and log(q/M) is −softplus(−x) = x − softplus(x), but for constants: they cancel in the gradient
    and add up to the entropy H(β) of the mixture in the loss. No logarithm of a vanishing M is ever taken, and
    where p dominates M the gradient keeps its digits.
    """
    x_BV = torch.sub(teacher_BV, student_BV, out=scratch_SBV[0])
    student, teacher = softmax_(student_BV, student_BV), softmax_(teacher_BV, teacher_BV)
    p_BV, q_BV = student_BV, teacher_BV
    apart_B = (student.largest_B - teacher.largest_B) + (student.above_B - teacher.above_B)
    x_BV.add_((apart_B + (math.log(beta) - math.log1p(-beta)))[:, None])
    softplus_BV = torch.ops.aten.softplus.out(x_BV, 1, 40, out=scratch_SBV[1])
    teacher_B = x_BV.sub_(softplus_BV).mul_(q_BV).sum(-1) / teacher.mass_B
    weighted_BV = softplus_BV.mul_(p_BV)
    student_B = weighted_BV.sum(-1) / student.mass_B
    p_BV.mul_(student_B[:, None]).sub_(weighted_BV).mul_(1.0 - beta)
    mixing = -beta * math.log(beta) - (1.0 - beta) * math.log1p(-beta)
    return (mixing + beta * teacher_B - (1.0 - beta) * student_B).clamp_min_(0.0), student.mass_B


# In place: (student logits, teacher logits, scratch, beta) -> nats [B] and a mass [B]. In the student's logits is then
# left the divergence's gradient with respect to them, times that mass.
GRADIENTS: dict[str, Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {
    "reverse_kl": reverse_kl_,
    "forward_kl": forward_kl_,
    "jsd": jsd_,
}


def plain_divergence(divergence: str, log_p_BV: Tensor, log_q_BV: Tensor, beta: float) -> Tensor:
    """The same divergence in nats [B], written as its definition and differentiated by autograd."""
    if divergence == "reverse_kl":
        return (log_p_BV.exp() * (log_p_BV - log_q_BV)).sum(-1)
    if divergence == "forward_kl":
        return (log_q_BV.exp() * (log_q_BV - log_p_BV)).sum(-1)
    p_BV, q_BV = log_p_BV.exp(), log_q_BV.exp()
    log_m_BV = torch.lerp(p_BV, q_BV, beta).clamp_min(torch.finfo(p_BV.dtype).tiny).log()
    teacher_kl_B = (q_BV * (log_q_BV - log_m_BV)).sum(-1)
    return beta * teacher_kl_B + (1.0 - beta) * (p_BV * (log_p_BV - log_m_BV)).sum(-1)


def check_divergence(divergence: str, beta: float, temperature: float) -> None:
    """Raises UserError for an unknown divergence, a β outside (0, 1) under jsd, or a temperature not above 0."""
    if divergence not in GRADIENTS:
        raise UserError(f"unknown divergence {divergence!r}: give one of {', '.join(GRADIENTS)}")
    if divergence == "jsd" and not 0.0 < beta < 1.0:
        raise UserError(f"beta {beta} for jsd: give a share in (0, 1); its ends are reverse_kl and forward_kl")
    if not 0.0 < temperature < float("inf"):
        raise UserError(f"loss temperature {temperature}: give a finite number above 0")


def token_fields_(
    needs: frozenset[str],
    student_BV: Tensor,
    teacher_BV: Tensor | None,
    scratch_SBV: Tensor,
    temperature: float,
    token_ids_B: Tensor | None,
) -> dict[str, Tensor]:
    """The fields of `TokenStats` named in `needs`, each [B], from logits, which are overwritten.

    teacher_BV may be None when `needs` names no teacher field. grad_norm_N is the norm with respect to the raw
    logits, hence its 1/T. Entropies are taken from logits below the largest one: a sum of terms of one sign, so that
    those of sure tokens keep their digits.
    """
    fields: dict[str, Tensor] = {}
    exp_BV, u_BV = scratch_SBV
    if teacher_BV is not None:
        if "top1_agree_N" in needs:
            best_B1 = student_BV.argmax(-1, keepdim=True)
            fields["top1_agree_N"] = teacher_BV.gather(-1, best_B1).squeeze(-1) == teacher_BV.amax(-1)
        if "teacher_rank_N" in needs:
            assert token_ids_B is not None
            fields["teacher_rank_N"] = (teacher_BV > teacher_BV.gather(-1, token_ids_B[:, None])).sum(-1)
        torch.sub(student_BV, teacher_BV, out=u_BV)
    student = softmax_(student_BV, exp_BV)
    if "entropy_N" in needs:
        fields["entropy_N"] = _entropy(student_BV, exp_BV, student)
    if teacher_BV is None:
        return fields
    mean_B = student.mass_B  # stands in where it is not read
    if needs & {"reverse_kl_N", "grad_norm_N"}:
        weighted_BV = torch.mul(exp_BV, u_BV, out=student_BV)
        mean_B = weighted_BV.sum(-1) / student.mass_B
        if "grad_norm_N" in needs:
            weighted_BV.addcmul_(exp_BV, mean_B[:, None], value=-1.0)
            fields["grad_norm_N"] = torch.linalg.vector_norm(weighted_BV, dim=-1) / (student.mass_B * temperature)
    if needs & {"reverse_kl_N", "forward_kl_N", "teacher_entropy_N"}:
        teacher = softmax_(teacher_BV, exp_BV)
        largest_B, above_B = student.largest_B - teacher.largest_B, student.above_B - teacher.above_B
        if "reverse_kl_N" in needs:
            fields["reverse_kl_N"] = ((mean_B - largest_B) - above_B).clamp_min_(0.0)
        if "forward_kl_N" in needs:
            mean_B = u_BV.mul_(exp_BV).sum(-1) / teacher.mass_B
            fields["forward_kl_N"] = (above_B - (mean_B - largest_B)).clamp_min_(0.0)
        if "teacher_entropy_N" in needs:
            fields["teacher_entropy_N"] = _entropy(teacher_BV, exp_BV, teacher)
    return fields


def _entropy(logits_BV: Tensor, p_BV: Tensor, normaliser: Normaliser) -> Tensor:
    """ln Σ exp − Σ p·logit in nats [B], both taken from the largest logit on. Overwrites the logits."""
    below_B = logits_BV.sub_(normaliser.largest_B[:, None]).mul_(p_BV).sum(-1) / normaliser.mass_B
    return (normaliser.above_B - below_B).clamp_min_(0.0)
