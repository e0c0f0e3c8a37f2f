"""Score → select → loss, over one micro-batch: where the token-selection hook sits.

Legend: N student tokens, K kept of them, V vocabulary, D and E the models' hidden sizes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from opsd.distill.chunks import ChunkTokens
from opsd.distill.divergence import Divergence, check_divergence
from opsd.distill.fused import LossSpec, fused_loss
from opsd.distill.inputs import Inputs, check_inputs, per_row
from opsd.distill.stats import build_stats, check_needs, score_rows
from opsd.distill.whole import whole_loss
from opsd.errors import UserError
from opsd.hooks import Selection, TokenSelector, TokenStats

LOSSES = {"fused": fused_loss, "whole": whole_loss}
# The statistic that a divergence is, where it is one: it then comes with the loss at no cost.
TRAINED_FIELD = {"reverse_kl": "reverse_kl_N", "forward_kl": "forward_kl_N"}


@dataclass(frozen=True)
class DistillResult:
    """loss_sum: Σ over kept tokens of weight·divergence, nats, differentiable. kept_N: bool, the tokens trained on.

    stats: what was computed on the way, else None. A field holds all rows, except that those of a selector's
    `needs_kept` hold NaN (0 for integers and bools) outside the kept rows.
    """

    loss_sum: Tensor
    kept_N: Tensor
    stats: TokenStats


def distill_loss(
    student_hidden_ND: Tensor,
    student_head_VD: Tensor,
    teacher_hidden_NE: Tensor,
    teacher_head_VE: Tensor,
    *,
    rollout_N: Tensor | None = None,
    token_ids_N: Tensor | None = None,
    selector: TokenSelector | None = None,
    kept_N: Tensor | None = None,
    weight_N: Tensor | None = None,
    divergence: Divergence = "reverse_kl",
    beta: float = 0.5,
    memory: Literal["fused", "whole"] = "fused",
    vocab_size: int | None = None,
    temperature: float = 1.0,
    chunk_tokens: ChunkTokens = "auto",
    seed: int = 0,
) -> DistillResult:
    """Divergence between student and teacher, summed over the tokens a selector keeps (paper Eq. 1, 7/9).

    student_hidden_ND, teacher_hidden_NE: final hidden states at the same N student tokens; the heads project them
    to logits. Gradients flow to the student's hidden states and head. Divide loss_sum once, by the kept count of
    the whole step. rollout_N: each token's rollout id (None: one rollout). selector, or kept_N instead: the mask as
    given, without scoring; neither: all tokens. weight_N multiplies a token's loss, never the count.
    divergence: reverse_kl = KL(P_S‖P_T), forward_kl, or jsd with `beta`. temperature divides both logits; gradients
    carry 1/T. memory: fused is flat in N, whole keeps K×V logits. vocab_size: rows of the heads that count (None:
    the lower head's). chunk_tokens bounds the rows worked on at once and does not change the result.
    Errors: UserError for arguments that do not fit, naming them.
    """
    inputs = check_inputs(student_hidden_ND, student_head_VD, teacher_hidden_NE, teacher_head_VE, vocab_size)
    check_divergence(divergence, beta, temperature)
    if memory not in LOSSES:
        raise UserError(f"memory {memory!r}: give fused or whole")
    if selector is not None and kept_N is not None:
        raise UserError("both a selector and kept_N were given: give one of them")
    rollout_N = per_row("rollout_N", rollout_N, inputs)
    token_ids_N = per_row("token_ids_N", token_ids_N, inputs)
    spec = LossSpec(divergence, beta, temperature, chunk_tokens)

    if selector is None:
        stats = build_stats(inputs, rollout_N, token_ids_N, {})
        selection = Selection(_mask(kept_N, inputs))
    else:
        stats = _score(inputs, selector, rollout_N, token_ids_N, spec)
        selection = selector(stats, seed)
        stats, selection = _weigh(inputs, selector, stats, selection, spec)

    kept_N = _mask(selection.kept_N, inputs)
    kept_K = kept_N.nonzero().squeeze(-1)
    all_kept = kept_K.shape[0] == inputs.rows
    rows_K = None if all_kept else kept_K
    weight_K = _weights(rows_K, inputs, weight_N, selection.weight_N)
    loss_sum, loss_K = LOSSES[memory](inputs, rows_K, weight_K, spec)

    free_field = TRAINED_FIELD.get(divergence)
    if all_kept and free_field is not None:
        stats = dataclasses.replace(stats, **{free_field: loss_K.float()})
    return DistillResult(loss_sum, kept_N, stats)


def _score(
    inputs: Inputs, selector: TokenSelector, rollout_N: Tensor | None, token_ids_N: Tensor | None, spec: LossSpec
) -> TokenStats:
    """What the selector reads over all rows."""
    needs = check_needs(selector.needs, token_ids_N, inputs.vocab_size)
    fields = score_rows(inputs, needs, spec.temperature, spec.chunk_tokens, token_ids_N)
    return build_stats(inputs, rollout_N, token_ids_N, fields)


def _weigh(
    inputs: Inputs, selector: TokenSelector, stats: TokenStats, selection: Selection, spec: LossSpec
) -> tuple[TokenStats, Selection]:
    """Score the kept rows for `needs_kept`, fill those fields in, and let the selector set weights by them."""
    if not selector.needs_kept:
        return stats, selection
    missing = check_needs(selector.needs_kept, stats.token_ids_N, inputs.vocab_size) - selector.needs
    kept_K = _mask(selection.kept_N, inputs).nonzero().squeeze(-1)
    fields = score_rows(inputs, missing, spec.temperature, spec.chunk_tokens, stats.token_ids_N, kept_K)
    stats = dataclasses.replace(stats, **fields)
    weigh = getattr(selector, "weigh", None)
    return stats, selection if weigh is None else weigh(stats, selection)


def _mask(kept_N: Tensor | None, inputs: Inputs) -> Tensor:
    """A bool mask [N]; all rows where none is given. Raises UserError for another type or length."""
    if kept_N is None:
        return torch.ones(inputs.rows, dtype=torch.bool, device=inputs.student_ND.device)
    if kept_N.dtype != torch.bool:
        raise UserError(f"kept_N has type {kept_N.dtype}: give one bool a token")
    mask_N = per_row("kept_N", kept_N, inputs)
    assert mask_N is not None
    return mask_N


def _weights(rows_K: Tensor | None, inputs: Inputs, *weights_N: Tensor | None) -> Tensor | None:
    """The product of the given weights on the trained rows [K], in the wide type; None if there is none."""
    product = None
    for weight_N in weights_N:
        weight_N = per_row("weight_N", weight_N, inputs)
        if weight_N is not None:
            weight_N = weight_N.detach().to(inputs.wide)
            product = weight_N if product is None else product * weight_N
    return product if product is None or rows_K is None else product[rows_K]
