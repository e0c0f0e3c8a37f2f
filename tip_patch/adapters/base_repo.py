"""Token selection inside the paper's base repository (HJSang/OPSD_OnPolicyDistillation), without changing it.

Its worker looks a loss up in the table `LOSS_FN_MAP` of `opd.losses` and calls it with logits. We replace the table's
entries with functions of the same signature that select tokens first and keep nothing of size N×V for backward:

    from opd import losses
    undo = patch(losses, load_selector("soft_or", retention=0.5))
    …
    undo()

A call there is one rollout if samples are weighted by reward or the micro-batch size is 1; a call that holds several
rollouts is treated as one, because the table's signature does not tell them apart.

Legend: N tokens of a call, K kept ones, C rows of a chunk, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opsd.distill.divergence import GRADIENTS, check_divergence, token_fields_
from opsd.distill.select import pick, weigh
from opsd.selection import SAMPLED_FIELDS, STATISTICS, Selection, TokenSelector, TokenStats, with_defaults
from opsd.utils.errors import UserError
from opsd.utils.seeding import derive_seed

SCOPES = ("micro_batch", "rollout")


def patch(losses: Any, selector: TokenSelector | None, seed: int = 0) -> Callable[[], None]:
    """Replace the losses of the table `losses.LOSS_FN_MAP`; the returned function puts the old ones back.

    selector: None trains on all tokens (the base repository's own loss, in bounded memory). seed: determines random
    choices, together with the call's number. Worker modules that already hold the table see the change.
    Errors: UserError for a module without the table, or for a selector that needs to see more than one call
    (scopes "batch" and "running") or the sampled tokens.
    """
    table = getattr(losses, "LOSS_FN_MAP", None)
    if not isinstance(table, dict):
        raise UserError(f"{getattr(losses, '__name__', losses)!r} has no LOSS_FN_MAP: give the module opd.losses")
    if selector is not None:
        _check(with_defaults(selector))
    before = dict(table)
    calls = _Calls(selector, seed)
    table |= {name: functools.partial(calls.loss, name) for name in before if name in ("reverse_kl", "forward_kl")}
    if "jsd" in before:
        table["jsd"] = calls.jsd

    def undo() -> None:
        table.clear()
        table.update(before)

    return undo


def _check(selector: TokenSelector) -> None:
    if selector.normalise_over not in SCOPES:
        raise UserError(
            f"normalise_over {selector.normalise_over!r} needs a whole step; here, give {' or '.join(SCOPES)}"
        )
    unknown = (selector.needs | selector.needs_kept) - STATISTICS.keys() - {"rollout_N", "vocab_size"}
    unknown |= (selector.needs | selector.needs_kept) & SAMPLED_FIELDS
    if unknown:
        raise UserError(f"the selector reads {min(unknown)}, which logits alone do not give: choose another selector")


class _Calls:
    """The table's functions. The call's number goes into the seed: each call draws its own random numbers."""

    def __init__(self, selector: TokenSelector | None, seed: int) -> None:
        self._selector, self._seed, self._number = selector, seed, 0

    def jsd(
        self, teacher_logits: Tensor, student_logits: Tensor, beta: float = 0.5, chunk_size: int = 256
    ) -> tuple[Tensor, int]:
        """See `loss`; beta is the teacher's share of the mixture."""
        return self.loss("jsd", teacher_logits, student_logits, chunk_size, beta)

    def loss(
        self, divergence: str, teacher_logits: Tensor, student_logits: Tensor, chunk_size: int = 512, beta: float = 0.5
    ) -> tuple[Tensor, int]:
        """Σ weight·divergence/K over the K kept of N tokens, nats, and K. Logits are [N, V]."""
        check_divergence(divergence, beta, 1.0)
        rows = student_logits.shape[0]
        selection = self._select(teacher_logits, student_logits, chunk_size)
        kept_K = torch.arange(rows, device=student_logits.device)
        weight_K = None
        if selection is not None:
            kept_K = selection.kept_N.nonzero().squeeze(-1)
            weight_K = None if selection.weight_N is None else selection.weight_N[kept_K]
        kept = kept_K.shape[0]
        loss_sum = _Divergence.apply(student_logits, teacher_logits, kept_K, weight_K, divergence, beta, chunk_size)
        return loss_sum / max(kept, 1), kept

    @torch.no_grad()
    def _select(self, teacher_NV: Tensor, student_NV: Tensor, chunk: int) -> Selection | None:
        """The selector's choice for this call, with its weights."""
        selector = self._selector
        if selector is None:
            return None
        self._number += 1
        stats = _stats(selector.needs | selector.needs_kept, teacher_NV, student_NV, chunk)
        return weigh(selector, stats, pick(selector, stats, derive_seed(self._seed, self._number)))


def _stats(needs: frozenset[str], teacher_NV: Tensor, student_NV: Tensor, chunk: int) -> TokenStats:
    """The fields of `TokenStats` named in `needs`, over all rows, chunk by chunk."""
    found: dict[str, list[Tensor]] = {name: [] for name in needs & STATISTICS.keys()}
    # `split` of no rows gives one empty chunk, so a call without tokens has empty fields rather than no fields.
    for student_CV, teacher_CV in zip(student_NV.split(chunk), teacher_NV.split(chunk), strict=True):
        fields = token_fields_(needs, *_wide(student_CV, teacher_CV))
        for name, parts in found.items():
            parts.append(fields[name])
    fields = {name: torch.cat(parts) for name, parts in found.items()}
    return TokenStats(
        rollout_N=torch.zeros(student_NV.shape[0], dtype=torch.int64, device=student_NV.device),
        vocab_size=student_NV.shape[1],
        **{name: fields.get(name) for name in STATISTICS},
    )


def _wide(student_CV: Tensor, teacher_CV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A chunk's student and teacher logits in fp32, and two scratch buffers; all are new memory."""
    student_CV, teacher_CV = (logits.to(torch.float32, copy=True) for logits in (student_CV, teacher_CV))
    return student_CV, teacher_CV, torch.empty((2, *student_CV.shape), device=student_CV.device)


class _Divergence(torch.autograd.Function):
    """Σ weight·divergence over rows kept_K of two blocks of logits; backward forms the gradient chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        student_NV: Tensor,
        teacher_NV: Tensor,
        kept_K: Tensor,
        weight_K: Tensor | None,
        divergence: str,
        beta: float,
        chunk: int,
    ) -> Tensor:
        ctx.save_for_backward(student_NV, teacher_NV, kept_K, weight_K)
        ctx.how = divergence, beta, chunk
        loss_sum = torch.zeros((), device=student_NV.device)
        for rows_C, _, loss_C in _pieces(student_NV, teacher_NV, kept_K, *ctx.how):
            loss_sum += (loss_C if weight_K is None else loss_C * weight_K[rows_C]).sum()
        return loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        student_NV, teacher_NV, kept_K, weight_K = ctx.saved_tensors
        grad_NV = torch.zeros_like(student_NV)
        for rows_C, gradient_CV, _ in _pieces(student_NV, teacher_NV, kept_K, *ctx.how):
            if weight_K is not None:
                gradient_CV.mul_(weight_K[rows_C, None])
            grad_NV[kept_K[rows_C]] = gradient_CV.mul_(grad_loss).to(grad_NV.dtype)
        return grad_NV, None, None, None, None, None, None


def _pieces(student_NV: Tensor, teacher_NV: Tensor, kept_K: Tensor, divergence: str, beta: float, chunk: int) -> Any:
    """For each chunk of kept rows: its slice of the K, its logit gradients [C, V] and divergences [C] in nats."""
    for first in range(0, kept_K.shape[0], chunk):
        rows_C = slice(first, first + chunk)
        where_C = kept_K[rows_C]
        student_CV, teacher_CV, scratch_SCV = _wide(student_NV[where_C], teacher_NV[where_C])
        loss_C, mass_C = GRADIENTS[divergence](student_CV, teacher_CV, scratch_SCV, beta)
        yield rows_C, student_CV.div_(mass_C[:, None]), loss_C
