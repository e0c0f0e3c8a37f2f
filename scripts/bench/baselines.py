"""What the loss is compared with: the usual ways to write it, and Liger's and TRL's if they are installed.

Each gives a function (student hidden, student head, teacher hidden, teacher head) -> loss sum over all tokens.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from opsd.utils.errors import first_line

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# The weight of the teacher's KL in what Liger and TRL call the JSD.
BETA = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}


class Unavailable(Exception):
    """A baseline that cannot run here, and why."""


def divergence_sum(
    divergence: str, student_CD: Tensor, student_VD: Tensor, teacher_CE: Tensor, teacher_VE: Tensor
) -> Tensor:
    """A chunk's divergence by its definition, logits in fp32, for autograd to differentiate."""
    log_p = torch.log_softmax((student_CD @ student_VD.T).float(), -1)
    with torch.no_grad():
        log_q = torch.log_softmax((teacher_CE @ teacher_VE.T).float(), -1)
    if divergence == "reverse_kl":
        return (log_p.exp() * (log_p - log_q)).sum()
    if divergence == "forward_kl":
        return (log_q.exp() * (log_q - log_p)).sum()
    log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
    return 0.5 * (log_q.exp() * (log_q - log_m)).sum() + 0.5 * (log_p.exp() * (log_p - log_m)).sum()


def graph_kept(divergence: str, chunk: int) -> Loss:
    """A chunk loop inside autograd: every chunk's logits and probabilities live until the backward pass."""

    def loss(student_ND: Tensor, student_VD: Tensor, teacher_NE: Tensor, teacher_VE: Tensor) -> Tensor:
        total = student_ND.new_zeros((), dtype=torch.float32)
        for student_CD, teacher_CE in zip(student_ND.split(chunk), teacher_NE.split(chunk), strict=True):
            total = total + divergence_sum(divergence, student_CD, student_VD, teacher_CE, teacher_VE)
        return total

    return loss


def recomputed(divergence: str, chunk: int) -> Loss:
    """The same loop with each chunk under torch's checkpoint: the backward pass projects it again."""

    def loss(student_ND: Tensor, student_VD: Tensor, teacher_NE: Tensor, teacher_VE: Tensor) -> Tensor:
        total = student_ND.new_zeros((), dtype=torch.float32)
        for student_CD, teacher_CE in zip(student_ND.split(chunk), teacher_NE.split(chunk), strict=True):
            arguments = (divergence, student_CD, student_VD, teacher_CE, teacher_VE)
            total = total + checkpoint(divergence_sum, *arguments, use_reentrant=False)
        return total

    return loss


def liger(divergence: str, chunk: int) -> Loss:
    """Liger's fused linear distillation loss in eager mode; its beta of 1 is the reverse KL.

    Compiled, a cold first call takes longer. Its labels serve the hard loss, which has weight 0.
    """
    losses = imported("liger_kernel.chunked_loss")
    criterion = losses.LigerFusedLinearJSDLoss(0.0, 1.0, beta=BETA[divergence], compiled=False, chunk_size=chunk)

    def loss(student_ND: Tensor, student_VD: Tensor, teacher_NE: Tensor, teacher_VE: Tensor) -> Tensor:
        labels = torch.zeros(student_ND.shape[0], dtype=torch.int64, device=student_ND.device)
        return criterion(student_ND, student_VD, teacher_NE, teacher_VE, labels) * student_ND.shape[0]

    return loss


def liger_triton(divergence: str, chunk: int) -> Loss:
    """Liger's fused linear JSD in Triton, CUDA only: logits in fp32, chunks of its own size, a sum in fp32."""
    if not torch.cuda.is_available():
        raise Unavailable("Liger's Triton kernels need CUDA")
    function = imported("liger_kernel.ops.fused_linear_jsd").LigerFusedLinearJSDFunction
    # Labels (none), beta, ignored label, temperature, and the dtype that the head's gradient is summed in.
    options = (None, BETA[divergence], -100, 1.0, torch.float32)
    return lambda *models: function.apply(*models, *options) * models[0].shape[0]


def trl(divergence: str, chunk: int) -> Loss:
    """TRL's divergence in chunks of its own size, with Triton on CUDA; the backward pass projects again."""
    function = imported("trl.kernels.chunked_divergence").ChunkedDivergenceFunction

    def loss(student_ND: Tensor, student_VD: Tensor, teacher_NE: Tensor, teacher_VE: Tensor) -> Tensor:
        nats_N, _ = function.apply(student_ND, student_VD, None, teacher_NE, teacher_VE, None, BETA[divergence])
        return nats_N.sum()

    return loss


def imported(module: str) -> Any:
    """A baseline's module. Raises Unavailable if its package, or one that it needs, is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"{module.split('.')[0]} cannot be imported ({first_line(error)})") from error


BASELINES: dict[str, Callable[[str, int], Loss]] = {
    "graph_kept": graph_kept,
    "recomputed": recomputed,
    "liger": liger,
    "liger_triton": liger_triton,
    "trl": trl,
}
