"""The divergences and the token statistics as plain maths on two blocks of logits.

Every function works in place on buffers it is handed, one row a token, so that nothing here allocates in
proportion to the vocabulary. Rows are independent: a caller may cut a chunk into any blocks.

Legend: B rows of a block, V shared vocabulary. P_S student, P_T teacher; p = P_S, q = P_T; natural logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

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


def reverse_kl_(log_p_BV: Tensor, log_q_BV: Tensor, scratch_SBV: Tensor, beta: float = 0.5) -> Tensor:
    """KL(P_S‖P_T) in nats [B]; log_p_BV becomes its gradient with respect to the student's scaled logits.

    With r = log p − log q and kl = Σ p·r, the gradient is p·(r − kl) (paper Eq. 1 and 3).
    """
    p_BV = torch.exp(log_p_BV, out=scratch_SBV[0])
    ratio_BV = log_p_BV.sub_(log_q_BV)
    weighted_BV = torch.mul(p_BV, ratio_BV, out=log_q_BV)
    kl_B = weighted_BV.sum(-1)
    torch.addcmul(weighted_BV, p_BV, kl_B[:, None], value=-1.0, out=log_p_BV)
    return kl_B.clamp_min_(0.0)


def forward_kl_(log_p_BV: Tensor, log_q_BV: Tensor, scratch_SBV: Tensor, beta: float = 0.5) -> Tensor:
    """KL(P_T‖P_S) in nats [B]; log_p_BV becomes its gradient p − q."""
    q_BV = torch.exp(log_q_BV, out=scratch_SBV[0])
    kl_B = log_q_BV.sub_(log_p_BV).mul_(q_BV).sum(-1)
    log_p_BV.exp_().sub_(q_BV)
    return kl_B.clamp_min_(0.0)


def jsd_(log_p_BV: Tensor, log_q_BV: Tensor, scratch_SBV: Tensor, beta: float = 0.5) -> Tensor:
    """β·KL(P_T‖M) + (1−β)·KL(P_S‖M) in nats [B], M = β·P_T + (1−β)·P_S; log_p_BV becomes its gradient.

    The gradient is (1−β)·p·(a − Σ p·a) with a = log(p/M). With x = log q − log p + log(β/(1−β)), a is
    −softplus(x) and log(q/M) is −softplus(−x) = x − softplus(x), but for constants: they cancel in the gradient
    and add up to the entropy H(β) of the mixture in the loss. No logarithm of a vanishing M is ever taken, and
    where p dominates M the gradient keeps its digits.
    """
    p_BV = torch.exp(log_p_BV, out=scratch_SBV[0])
    q_BV = torch.exp(log_q_BV, out=scratch_SBV[1])
    x_BV = log_q_BV.sub_(log_p_BV).add_(math.log(beta) - math.log1p(-beta))
    softplus_BV = torch.ops.aten.softplus.out(x_BV, 1, 40, out=log_p_BV)
    teacher_B = x_BV.sub_(softplus_BV).mul_(q_BV).sum(-1)
    weighted_BV = softplus_BV.mul_(p_BV)
    student_B = weighted_BV.sum(-1)
    weighted_BV.addcmul_(p_BV, student_B[:, None], value=-1.0).mul_(beta - 1.0)
    mixing = -beta * math.log(beta) - (1.0 - beta) * math.log1p(-beta)
    return (mixing + beta * teacher_B - (1.0 - beta) * student_B).clamp_min_(0.0)


# In place: (log_p, log_q, scratch, beta) -> nats [B], with the logit gradient left in log_p.
GRADIENTS: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
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
    log_p_BV: Tensor,
    log_q_BV: Tensor | None,
    scratch_SBV: Tensor,
    temperature: float,
    token_ids_B: Tensor | None,
) -> dict[str, Tensor]:
    """The fields of `TokenStats` named in `needs`, each [B].

    log_q_BV may be None when `needs` names no teacher field. grad_norm_N is the norm with respect to the raw
    logits, hence its 1/T.
    """
    fields: dict[str, Tensor] = {}
    exp_BV, work_BV = scratch_SBV
    p_BV = torch.exp(log_p_BV, out=exp_BV)
    if "entropy_N" in needs:
        fields["entropy_N"] = torch.mul(p_BV, log_p_BV, out=work_BV).sum(-1).neg_().clamp_min_(0.0)
    if log_q_BV is None:
        return fields
    if needs & {"reverse_kl_N", "grad_norm_N"}:
        torch.sub(log_p_BV, log_q_BV, out=work_BV)
        kl_B = work_BV.mul_(p_BV).sum(-1)
        if "grad_norm_N" in needs:
            work_BV.addcmul_(p_BV, kl_B[:, None], value=-1.0)
            fields["grad_norm_N"] = torch.linalg.vector_norm(work_BV, dim=-1) / temperature
        if "reverse_kl_N" in needs:
            fields["reverse_kl_N"] = kl_B.clamp_min_(0.0)
    if "top1_agree_N" in needs:
        best_B1 = log_p_BV.argmax(-1, keepdim=True)
        fields["top1_agree_N"] = log_q_BV.gather(-1, best_B1).squeeze(-1) == log_q_BV.amax(-1)
    if "teacher_rank_N" in needs:
        assert token_ids_B is not None
        fields["teacher_rank_N"] = (log_q_BV > log_q_BV.gather(-1, token_ids_B[:, None])).sum(-1)
    if needs & {"forward_kl_N", "teacher_entropy_N"}:
        q_BV = torch.exp(log_q_BV, out=exp_BV)
        if "teacher_entropy_N" in needs:
            fields["teacher_entropy_N"] = torch.mul(q_BV, log_q_BV, out=work_BV).sum(-1).neg_().clamp_min_(0.0)
        if "forward_kl_N" in needs:
            torch.sub(log_q_BV, log_p_BV, out=work_BV)
            fields["forward_kl_N"] = work_BV.mul_(q_BV).sum(-1).clamp_min_(0.0)
    return fields
