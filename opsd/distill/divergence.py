"""The divergences and the token statistics as plain maths on two blocks of logits.

Every function works in place on buffers it is handed, one row per token, so that nothing here allocates in
proportion to the vocabulary. Rows are independent: a caller may cut a chunk into any blocks.

Legend: B rows of a block, V shared vocabulary. P_S student, P_T teacher; p = P_S, q = P_T; natural logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from opsd.selection import SUPPORT_TOKENS
from opsd.types import Transform
from opsd.utils.errors import UserError

Divergence = Literal["reverse_kl", "forward_kl", "jsd", "eopd", "sampled_token"]
SAMPLED: Divergence = "sampled_token"
SCRATCH_BUFFERS = 2
# Statistics that need both models' sums of exponentials.
_OF_BOTH_MASSES = frozenset({"reverse_kl_N", "forward_kl_N", "teacher_entropy_N", "teacher_mass_N", "log_ratio_N"})


def logits_(
    products_BW: Tensor, transform: Transform, height: int, temperature: float, tanh_BW: Tensor | None = None
) -> Tensor:
    """Turn hidden·headᵀ + bias into a model's logits over the temperature, in place.

    height: how many entries of a row belong to the vocabulary; the padding after them stays far below. tanh_BW: a
    buffer that receives the tanh of a soft cap, for its derivative.
    """
    if transform.softcap is not None:
        scaled_BV = products_BW[:, :height].mul_(transform.scale / transform.softcap)
        tanh_BV = torch.tanh(scaled_BV, out=scaled_BV if tanh_BW is None else tanh_BW[:, :height])
        torch.mul(tanh_BV, transform.softcap / temperature, out=scaled_BV)
    elif transform.scale != 1.0:
        products_BW[:, :height].mul_(transform.scale / temperature)
    elif temperature != 1.0:
        products_BW.div_(temperature)
    return products_BW


def through_cap_(grad_BW: Tensor, tanh_BW: Tensor, height: int) -> None:
    """Turn a gradient with respect to capped logits into one with respect to the uncapped ones, in place.

    tanh_BW: as `logits_` left it.
    """
    grad_BV = grad_BW[:, :height]
    torch.ops.aten.tanh_backward.grad_input(grad_BV, tanh_BW[:, :height], grad_input=grad_BV)


def centre_(logits_BV: Tensor) -> Tensor:
    """Subtract each row's largest logit, in place.

    A constant shift of a row is removed before anything is summed: a sum of p·(difference of logits) rounds in
    proportion to its terms, so with rows that are 20 apart it would be off by 1e-5 of a divergence of 0.1 nats.
    """
    return logits_BV.sub_(logits_BV.amax(-1, keepdim=True))


def exp_(centred_BV: Tensor, out_BV: Tensor) -> Tensor:
    """exp of centred logits into out_BV, which may be the same tensor; returns its mass Σ exp [B], from 1 to V.

    The result is not divided by the mass: callers divide after they have summed a row. Torch's softmax sums one term
    after another, which over 150,000 tokens is off by 1e-5; `sum` adds in nested blocks.
    """
    return torch.exp(centred_BV, out=out_BV).sum(-1)


def reverse_kl_(
    student_BV: Tensor, teacher_BV: Tensor, scratch_SBV: Tensor, beta: float = 0.5
) -> tuple[Tensor, Tensor]:
    """KL(P_S‖P_T). With r = log p − log q and kl = Σ p·r the gradient is p·(r − kl) (paper Eq. 1 and 3).

    The normalisers cancel in r − kl, so differences u of centred logits suffice: p·(u − Σ p·u).
    """
    u_BV = torch.sub(centre_(student_BV), centre_(teacher_BV), out=scratch_SBV[0])
    student_B, teacher_B = exp_(student_BV, student_BV), exp_(teacher_BV, teacher_BV)
    p_BV = student_BV
    weighted_BV = u_BV.mul_(p_BV)
    mean_B = weighted_BV.sum(-1) / student_B
    torch.addcmul(weighted_BV, p_BV, mean_B[:, None], value=-1.0, out=p_BV)
    return (mean_B - (student_B / teacher_B).log_()).clamp_min_(0.0), student_B


def forward_kl_(
    student_BV: Tensor, teacher_BV: Tensor, scratch_SBV: Tensor, beta: float = 0.5
) -> tuple[Tensor, Tensor]:
    """KL(P_T‖P_S), with gradient p − q."""
    u_BV = torch.sub(centre_(teacher_BV), centre_(student_BV), out=scratch_SBV[0])
    student_B, teacher_B = exp_(student_BV, student_BV), exp_(teacher_BV, teacher_BV)
    mean_B = u_BV.mul_(teacher_BV).sum(-1) / teacher_B
    ratio_B = student_B / teacher_B
    student_BV.addcmul_(teacher_BV, ratio_B[:, None], value=-1.0)
    return (mean_B + ratio_B.log_()).clamp_min_(0.0), student_B


def jsd_(student_BV: Tensor, teacher_BV: Tensor, scratch_SBV: Tensor, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    """β·KL(P_T‖M) + (1−β)·KL(P_S‖M), M = β·P_T + (1−β)·P_S.

    The gradient is (1−β)·p·(a − Σ p·a) with a = log(p/M). With x = log q − log p + log(β/(1−β)), a is
    −softplus(x) and log(q/M) is −softplus(−x) = x − softplus(x), up to constants: they cancel in the gradient
    and add up to the entropy H(β) of the mixture in the loss. No logarithm of a vanishing M is ever taken, and
    the gradient stays accurate where p dominates M.
    """
    x_BV = torch.sub(centre_(teacher_BV), centre_(student_BV), out=scratch_SBV[0])
    student_B, teacher_B = exp_(student_BV, student_BV), exp_(teacher_BV, teacher_BV)
    p_BV, q_BV = student_BV, teacher_BV
    x_BV.add_(((student_B / teacher_B).log_() + (math.log(beta) - math.log1p(-beta)))[:, None])
    softplus_BV = torch.ops.aten.softplus.out(x_BV, 1, 40, out=scratch_SBV[1])
    teacher_nats_B = x_BV.sub_(softplus_BV).mul_(q_BV).sum(-1) / teacher_B
    weighted_BV = softplus_BV.mul_(p_BV)
    student_nats_B = weighted_BV.sum(-1) / student_B
    p_BV.mul_(student_nats_B[:, None]).sub_(weighted_BV).mul_(1.0 - beta)
    mixing = -beta * math.log(beta) - (1.0 - beta) * math.log1p(-beta)
    return (mixing + beta * teacher_nats_B - (1.0 - beta) * student_nats_B).clamp_min_(0.0), student_B


def eopd_(student_BV: Tensor, teacher_BV: Tensor, scratch_SBV: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """KL(P_S‖P_T) + 1[H(P_T) > τ]·KL(P_T‖P_S): the forward KL is added where the teacher is unsure (τ in nats).

    Entropy-Aware On-Policy Distillation, arXiv 2603.07079: L = L_OPD + λ·1[H(p_T) > τ]·L_FKL with τ = 0.8. Its authors
    estimate the reverse KL on the sampled token, clipped, and take the forward KL over the teacher's 16 likeliest
    tokens. Both are exact here, over the whole vocabulary, with λ = 1: our reading. The gate depends on the teacher
    alone, so the gradient is p·(r − kl) + 1[…]·(p − q).
    """
    u_BV = torch.sub(centre_(student_BV), centre_(teacher_BV), out=scratch_SBV[0])
    student_B, teacher_B = exp_(student_BV, student_BV), exp_(teacher_BV, scratch_SBV[1])
    p_BV, q_BV = student_BV, scratch_SBV[1]
    gate_B = (_entropy(teacher_BV, q_BV, teacher_B) > threshold).to(u_BV.dtype)
    apart_B = (student_B / teacher_B).log_()
    forward_B = (apart_B - torch.mul(u_BV, q_BV, out=teacher_BV).sum(-1) / teacher_B).clamp_min_(0.0)
    weighted_BV = u_BV.mul_(p_BV)
    mean_B = weighted_BV.sum(-1) / student_B
    torch.addcmul(weighted_BV, p_BV, (gate_B - mean_B)[:, None], out=p_BV)
    p_BV.addcmul_(q_BV, (gate_B * student_B / teacher_B)[:, None], value=-1.0)
    return (mean_B - apart_B).clamp_min_(0.0) + gate_B * forward_B, student_B


# In place: (student logits, teacher logits, scratch, parameter) -> nats [B] and a mass [B]. The student's logits are
# replaced by the divergence's gradient with respect to them, times that mass. parameter: jsd's β, eopd's τ.
GRADIENTS: dict[str, Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {
    "reverse_kl": reverse_kl_,
    "forward_kl": forward_kl_,
    "jsd": jsd_,
    "eopd": eopd_,
}


def sampled_token_(
    student_BV: Tensor, teacher_BV: Tensor, scratch_SBV: Tensor, token_ids_B: Tensor
) -> tuple[Tensor, Tensor]:
    """a = log p_y − log q_y at the sampled token y, with the gradient a·(1_y − p) of a policy gradient.

    In the form of tinker-cookbook, slime and prime-rl: −ratio·A with advantage A = −a, held fixed, and ratio = p_y over
    its value when y was sampled. Each step here makes one update from its own samples, so the ratio is 1 and its
    gradient is that of log p_y. In expectation over y ~ p, value and gradient are those of the reverse KL, since
    E[1_y − p] = 0; a single draw is off by as much as a varies over the vocabulary. The value may be negative.
    """
    centre_(student_BV), centre_(teacher_BV)
    place_B1 = token_ids_B[:, None]
    apart_B = (student_BV.gather(1, place_B1) - teacher_BV.gather(1, place_B1)).squeeze(1)
    student_B, teacher_B = exp_(student_BV, student_BV), exp_(teacher_BV, teacher_BV)
    a_B = apart_B - (student_B / teacher_B).log_()
    student_BV.mul_(-a_B[:, None]).scatter_add_(1, place_B1, (a_B * student_B)[:, None])
    return a_B, student_B


def plain_divergence(divergence: str, log_p_BV: Tensor, log_q_BV: Tensor, parameter: float) -> Tensor:
    """The same divergence in nats [B], written as its definition and differentiated by autograd."""
    if divergence == "eopd":
        unsure_B = -(log_q_BV.exp() * log_q_BV).sum(-1) > parameter
        reverse_B, forward_B = (plain_divergence(f"{kl}_kl", log_p_BV, log_q_BV, 0.0) for kl in ("reverse", "forward"))
        return reverse_B + unsure_B * forward_B
    if divergence == "reverse_kl":
        return (log_p_BV.exp() * (log_p_BV - log_q_BV)).sum(-1)
    if divergence == "forward_kl":
        return (log_q_BV.exp() * (log_q_BV - log_p_BV)).sum(-1)
    p_BV, q_BV, beta = log_p_BV.exp(), log_q_BV.exp(), parameter
    log_m_BV = torch.lerp(p_BV, q_BV, beta).clamp_min(torch.finfo(p_BV.dtype).tiny).log()
    teacher_kl_B = (q_BV * (log_q_BV - log_m_BV)).sum(-1)
    return beta * teacher_kl_B + (1.0 - beta) * (p_BV * (log_p_BV - log_m_BV)).sum(-1)


def check_divergence(divergence: str, beta: float, temperature: float) -> None:
    """Raises UserError for an unknown divergence, a β outside (0, 1) under jsd, or a temperature not above 0."""
    if divergence not in (*GRADIENTS, SAMPLED):
        raise UserError(f"unknown divergence {divergence!r}: give one of {', '.join(GRADIENTS)}, {SAMPLED}")
    if divergence == "jsd" and not 0.0 < beta < 1.0:
        raise UserError(f"beta {beta} for jsd: give a number in (0, 1); the limits are reverse_kl and forward_kl")
    if not 0.0 < temperature < float("inf"):
        raise UserError(f"loss temperature {temperature}: give a finite number above 0")


def token_fields_(
    needs: frozenset[str],
    student_BV: Tensor,
    teacher_BV: Tensor | None,
    scratch_SBV: Tensor,
    token_ids_B: Tensor | None = None,
) -> dict[str, Tensor]:
    """The fields of `TokenStats` named in `needs`, each [B], from logits, which are overwritten.

    teacher_BV may be None when `needs` names no teacher field. grad_norm_N is for the gradient with respect to these
    logits; with respect to those before the temperature, the norm is 1/T of it. Entropies are computed from centred
    logits: all terms then have the same sign, so that small entropies stay accurate.
    """
    fields: dict[str, Tensor] = {}
    exp_BV, u_BV = scratch_SBV[0], scratch_SBV[1]
    support_BK = None if "teacher_mass_N" not in needs else likeliest(student_BV)
    if teacher_BV is not None:
        if "top1_agree_N" in needs:
            best_B1 = student_BV.argmax(-1, keepdim=True)
            fields["top1_agree_N"] = teacher_BV.gather(-1, best_B1).squeeze(-1) == teacher_BV.amax(-1)
        if "teacher_rank_N" in needs:
            assert token_ids_B is not None
            fields["teacher_rank_N"] = (teacher_BV > teacher_BV.gather(-1, token_ids_B[:, None])).sum(-1)
        centre_(teacher_BV)
    centre_(student_BV)
    if teacher_BV is not None:
        torch.sub(student_BV, teacher_BV, out=u_BV)
    student_B = exp_(student_BV, exp_BV)
    if "entropy_N" in needs:
        fields["entropy_N"] = _entropy(student_BV, exp_BV, student_B)
    if teacher_BV is None:
        return fields
    mean_B = student_B  # a placeholder, never read
    if needs & {"reverse_kl_N", "grad_norm_N"}:
        weighted_BV = torch.mul(exp_BV, u_BV, out=student_BV)
        mean_B = weighted_BV.sum(-1) / student_B
        if "grad_norm_N" in needs:
            weighted_BV.addcmul_(exp_BV, mean_B[:, None], value=-1.0)
            fields["grad_norm_N"] = torch.linalg.vector_norm(weighted_BV, dim=-1) / student_B
    if needs & _OF_BOTH_MASSES:
        teacher_B = exp_(teacher_BV, exp_BV)
        apart_B = (student_B / teacher_B).log_()
        if support_BK is not None:
            fields["teacher_mass_N"] = exp_BV.gather(-1, support_BK).sum(-1) / teacher_B
        if "log_ratio_N" in needs:
            assert token_ids_B is not None
            fields["log_ratio_N"] = apart_B - u_BV.gather(-1, token_ids_B[:, None]).squeeze(-1)
        if "reverse_kl_N" in needs:
            fields["reverse_kl_N"] = (mean_B - apart_B).clamp_min_(0.0)
        if "forward_kl_N" in needs:
            mean_B = u_BV.mul_(exp_BV).sum(-1) / teacher_B
            fields["forward_kl_N"] = (apart_B - mean_B).clamp_min_(0.0)
        if "teacher_entropy_N" in needs:
            fields["teacher_entropy_N"] = _entropy(teacher_BV, exp_BV, teacher_B)
    return fields


def likeliest(logits_BV: Tensor) -> Tensor:
    """Ids of each row's `SUPPORT_TOKENS` largest logits [B, K], unordered; all ids if there are no more."""
    return logits_BV.topk(min(SUPPORT_TOKENS, logits_BV.shape[-1]), sorted=False).indices


def _entropy(centred_BV: Tensor, exp_BV: Tensor, mass_B: Tensor) -> Tensor:
    """ln Σ exp − Σ p·logit in nats [B]. Overwrites the centred logits."""
    below_B = centred_BV.mul_(exp_BV).sum(-1) / mass_B
    return (mass_B.log() - below_B).clamp_min_(0.0)
