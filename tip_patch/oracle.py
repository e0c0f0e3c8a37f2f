"""What a token's gradient is worth: the paper's Proposition 1, measured on a model small enough for it.

A step of size η along w·g_t lowers the loss by at least ηw·φ − (β/2)·η²w²·M, with φ = ⟨∇L, E g_t⟩, M = E‖g_t‖² and β
the loss's smoothness. The best weight is w* = φ/(ηβM) and its descent φ²/(2βM). β is unknown and the same for all
tokens, so weights are reported in units of 1/(ηβ) and descents in units of 1/β.

Legend: N student tokens of one rollout, P parameters, V shared vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from opsd.types import MicroBatch

# If the curvature vanishes, a quadratic model gives only the sign of a weight.
CURVATURE_CAP = 1e3
JACOBIAN_TOKENS = 16


def token_losses(model: nn.Module, parameters: dict[str, Tensor], micro: MicroBatch, log_q_NV: Tensor) -> Tensor:
    """KL(P_S‖P_T) of each student token [N], nats, as a function of the student's parameters (paper Eq. 1)."""
    log_p_NV = _log_probs(model, parameters, micro, log_q_NV.shape[1])
    return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)


def token_gradients(model: nn.Module, micro: MicroBatch, log_q_NV: Tensor) -> Tensor:
    """g_t of each student token [N, P]: the gradient of its own loss with respect to all parameters.

    log_q_NV: the teacher's log-probabilities. The model must run under torch.func (attention "eager").
    """
    parameters = _parameters(model)
    jacobian = jacrev(lambda values: token_losses(model, values, micro, log_q_NV), chunk_size=JACOBIAN_TOKENS)
    return torch.cat([part.flatten(1) for part in jacobian(parameters).values()], dim=1)


def mean_gradient(model: nn.Module, micros: list[MicroBatch], teacher_logs: list[Tensor]) -> Tensor:
    """∇L [P]: the gradient of the mean loss over all student tokens of some rollouts."""
    parameters = {name: value.requires_grad_() for name, value in _parameters(model).items()}
    total = torch.zeros(sum(value.numel() for value in parameters.values()))
    for micro, log_q_NV in zip(micros, teacher_logs, strict=True):
        loss = token_losses(model, parameters, micro, log_q_NV).sum()
        total += torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(parameters.values()))])
    return total / sum(micro.student_tokens() for micro in micros)


def signal_to_curvature(log_p_NV: Tensor, log_q_NV: Tensor, cap: float = CURVATURE_CAP) -> Tensor:
    """‖g‖²/(gᵀHg) [N] with g = P_S − P_T and H = diag(P_S) − P_S·P_Sᵀ (paper v4 Eq. 6, without its 1/η).

    Needs the two distributions only. The curvature vanishes on confident students: capped at `cap`, and 0/0 = 0.
    """
    p_NV = log_p_NV.double().exp()
    g_NV = p_NV - log_q_NV.double().exp()
    signal_N = g_NV.square().sum(-1)
    curvature_N = (p_NV * g_NV.square()).sum(-1) - (p_NV * g_NV).sum(-1).square()
    ratio_N = signal_N / curvature_N.clamp_min(torch.finfo(torch.float64).tiny)
    return torch.where(signal_N > 0, ratio_N.clamp_max(cap), 0.0)


@dataclass(frozen=True)
class TokenWorth:
    """Measurements of each token of some rollouts, arrays [N] over all of them.

    alignment: φ_t = ⟨∇L, g_t⟩. square: M_t = ‖g_t‖². local: `signal_to_curvature`. entropy, reverse_kl: nats.
    rollout: which rollout. gradient_square: ‖∇L‖².
    """

    alignment: np.ndarray
    square: np.ndarray
    local: np.ndarray
    entropy: np.ndarray
    reverse_kl: np.ndarray
    rollout: np.ndarray
    gradient_square: float

    @property
    def cosine_square(self) -> np.ndarray:
        """cos² of the angle between g_t and ∇L; 0 for a gradient of 0. A token's own φ²/M is ‖∇L‖² times this."""
        scale = self.square * self.gradient_square
        return np.divide(self.alignment**2, scale, out=np.zeros_like(scale), where=scale > 0)


def measure(
    model: nn.Module,
    micros: list[MicroBatch],
    teacher_logs: list[Tensor],
    gradient_P: Tensor,
    cap: float = CURVATURE_CAP,
) -> TokenWorth:
    """The worth of every student token of some rollouts, one rollout per micro-batch, under ∇L = gradient_P."""
    columns: list[np.ndarray] = []
    for micro, log_q_NV in zip(micros, teacher_logs, strict=True):
        g_NP = token_gradients(model, micro, log_q_NV)
        with torch.no_grad():
            log_p_NV = _log_probs(model, _parameters(model), micro, log_q_NV.shape[1])
        p_NV = log_p_NV.exp()
        rows = [
            g_NP @ gradient_P,
            g_NP.square().sum(-1),
            signal_to_curvature(log_p_NV, log_q_NV, cap),
            -(p_NV * log_p_NV).sum(-1),
            (p_NV * (log_p_NV - log_q_NV)).sum(-1),
            micro.rollout_N,
        ]
        columns.append(np.stack([row.double().numpy() for row in rows]))
    return TokenWorth(*np.concatenate(columns, axis=1), gradient_square=float(gradient_P.square().sum()))


@dataclass(frozen=True)
class QuadrantWorth:
    """One quadrant. share: of tokens. alignment: φ_Q, the mean of φ_t. square: M_Q, the mean of ‖g_t‖².

    weight: w* = φ_Q/M_Q in units of 1/(ηβ). descent: φ_Q²/(2M_Q) in units of 1/β, one step along the quadrant's mean
    gradient. token_descent: the mean over its tokens of ‖∇L‖²cos²/2, each in its own context: the gradient's size
    cancels. descent_share: Σφ_t of the quadrant over that of all tokens, its contribution if all weights are 1.
    local_median: the closed-form weight's median. The intervals are 95 %, by resampling rollouts.
    """

    share: float
    alignment: float
    square: float
    weight: float
    descent: float
    descent_interval: tuple[float, float]
    token_descent: float
    token_descent_interval: tuple[float, float]
    descent_share: float
    local_median: float


def by_quadrant(
    worth: TokenWorth, quadrant: np.ndarray, resamples: int = 2000, seed: int = 0
) -> dict[int, QuadrantWorth]:
    """Proposition 1 with its expectations taken over each quadrant's tokens; quadrants without tokens are left out."""
    rollouts = np.unique(worth.rollout)
    owner = np.searchsorted(rollouts, worth.rollout)
    draws = np.random.default_rng(seed).integers(0, len(rollouts), (resamples, len(rollouts)))
    times = np.stack([np.bincount(draw, minlength=len(rollouts)) for draw in draws])
    found = {}
    for q in (1, 2, 3, 4):
        mine = quadrant == q
        if mine.any():
            found[q] = _one_quadrant(worth, mine, owner, times)
    return found


def _one_quadrant(worth: TokenWorth, mine: np.ndarray, owner: np.ndarray, times: np.ndarray) -> QuadrantWorth:
    columns = (np.ones(len(mine)), worth.alignment, worth.square, worth.cosine_square)
    sums_4R = np.stack([np.bincount(owner[mine], column[mine], minlength=times.shape[1]) for column in columns])
    descent, token_descent = _descents(sums_4R.sum(1)[:, None], worth.gradient_square)
    resampled = _descents(sums_4R @ times.T, worth.gradient_square)
    intervals = [(float(np.nanquantile(values, 0.025)), float(np.nanquantile(values, 0.975))) for values in resampled]
    alignment, square = worth.alignment[mine].mean(), worth.square[mine].mean()
    return QuadrantWorth(
        share=float(mine.mean()),
        alignment=float(alignment),
        square=float(square),
        weight=float(alignment / square) if square > 0 else 0.0,
        descent=float(descent[0]),
        descent_interval=intervals[0],
        token_descent=float(token_descent[0]),
        token_descent_interval=intervals[1],
        descent_share=float(worth.alignment[mine].sum() / worth.alignment.sum()),
        local_median=float(np.median(worth.local[mine])),
    )


def _descents(sums_4B: np.ndarray, gradient_square: float) -> tuple[np.ndarray, np.ndarray]:
    """Both descents from Σ1, Σφ, Σ‖g‖² and Σcos² of B samples; nan for a sample without a token of the quadrant."""
    count, alignment, square, cosine_square = np.where(sums_4B[0] > 0, sums_4B, np.nan)
    descent = np.divide(alignment**2, 2 * count * square, out=np.zeros_like(count), where=~(square == 0))
    return descent, gradient_square * cosine_square / count / 2


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _log_probs(model: nn.Module, parameters: dict[str, Tensor], micro: MicroBatch, vocab_size: int) -> Tensor:
    """The student's log-probabilities at the micro-batch's rows [N, V]."""
    inputs = {"input_ids": micro.input_ids_1L, "position_ids": micro.position_ids_1L, "use_cache": False}
    logits_LV = functional_call(model, parameters, (), inputs).logits[0]
    return logits_LV[micro.rows_N, :vocab_size].log_softmax(-1)
