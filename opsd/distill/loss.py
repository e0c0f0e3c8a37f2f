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
from opsd.distill.divergence import SAMPLED, Divergence
from opsd.distill.fused import FusedLoss, Trained
from opsd.distill.inputs import ENTROPY_THRESHOLD, Inputs, LossSpec, check_inputs, on_rows
from opsd.distill.materialized import materialized_loss
from opsd.distill.select import Choice, choose, mask_of
from opsd.distill.stats import check_needs
from opsd.selection import Selection, TokenSelector, TokenStats, field_of, with_defaults
from opsd.types import Head
from opsd.utils.errors import UserError


@dataclass(frozen=True)
class DistillResult:
    """loss_sum: Σ over kept tokens of weight·divergence, nats, differentiable. kept_N: bool, the tokens trained on.

    stats: the fields that were computed; the others are None. A field holds all rows, except that those of a selector's
    `needs_kept` hold NaN (0 for integers and bools) outside the kept rows.
    """

    loss_sum: Tensor
    kept_N: Tensor
    stats: TokenStats


def distill_loss(
    student_hidden_ND: Tensor,
    student_head_VD: Tensor | Head,
    teacher_hidden_NE: Tensor,
    teacher_head_VE: Tensor | Head | None,
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
    entropy_threshold: float = ENTROPY_THRESHOLD,
) -> DistillResult:
    """Divergence between student and teacher, summed over the tokens a selector keeps (paper Eq. 1, 7/9).

    student_hidden_ND, teacher_hidden_NE: final hidden states at the same N student tokens. The heads: weights [V, D]
    and [V, E], or a `Head` for a bias, a scale or a soft cap; the teacher's is None if
    teacher_hidden_NE holds some log-probabilities (`top_log_probs.packed`). Gradients flow to the student's
    hidden states, weight and bias. Divide loss_sum once, by the kept count of
    the whole step. rollout_N: each token's rollout id (None: one rollout). selector: the rule that keeps tokens; or
    kept_N: the mask itself, without scoring; neither: all tokens. weight_N multiplies a token's loss, never the count.
    divergence: reverse_kl = KL(P_S‖P_T), forward_kl, jsd with `beta`, eopd (the reverse KL, and the forward KL too
    where the teacher's entropy is above `entropy_threshold` nats), or sampled_token (the log-ratio at token_ids_N, with
    a policy gradient; see `divergence.sampled_token_`). temperature divides both logits; gradients
    carry 1/T. memory: fused is flat in N, whole keeps K×V logits. vocab_size: how many rows of the heads are used
    (None: those of the smaller head). chunk_tokens bounds the rows processed at once and does not change the result.
    Errors: UserError for arguments that do not fit, naming them.
    """
    spec = LossSpec(divergence, beta, temperature, chunk_tokens, memory, entropy_threshold)
    if selector is not None and kept_N is not None:
        raise UserError("both a selector and kept_N were given: give one of them")
    models = (student_hidden_ND, student_head_VD, teacher_hidden_NE, teacher_head_VE)
    inputs = check_inputs(
        *models, vocab_size=vocab_size, rollout_N=rollout_N, token_ids_N=token_ids_N, weight_N=weight_N
    )
    selection = None if kept_N is None else Selection(kept_N)
    rule = None if selector is None else with_defaults(selector)
    return distill(inputs, Choice(rule, selection, seed), spec)


def distill(inputs: Inputs, choice: Choice, spec: LossSpec) -> DistillResult:
    """`distill_loss` on checked inputs. Autocast is off here: they state which types products are computed in."""
    if spec.divergence == SAMPLED:
        # The check for a statistic of the sampled tokens: they must be given, and in the vocabulary.
        check_needs(frozenset({"teacher_rank_N"}), inputs)
    with torch.autocast(inputs.student_ND.device.type, enabled=False):
        stats, selection, held = choose(inputs, choice, spec)
        kept_N = mask_of(selection.kept_N, inputs)
        kept_K = kept_N.nonzero().squeeze(-1)
        all_kept = kept_K.shape[0] == inputs.rows
        rows_K = None if all_kept else kept_K
        trained = Trained(inputs, rows_K, _weights(rows_K, inputs, selection.weight_N), spec)
        if spec.memory == "whole":
            loss_sum, loss_K = materialized_loss(trained)
        else:
            states = inputs.leaves
            if not torch.is_grad_enabled():
                states = tuple(None if state is None else state.detach() for state in states)
            loss_sum, loss_K = FusedLoss.apply(*states, trained, held)
        field = field_of(spec.divergence)
        if all_kept and field is not None:
            stats = dataclasses.replace(stats, **{field: loss_K.float()})  # pyrefly: ignore[bad-argument-type]
        return DistillResult(loss_sum, kept_N, stats)


def _weights(rows_K: Tensor | None, inputs: Inputs, selected_N: Tensor | None) -> Tensor | None:
    """The caller's weights times the selection's on the trained rows [K], in the wide type; None without either."""
    product = None
    for weight_N in (inputs.weight_N, on_rows("weight_N", selected_N, inputs.student_ND)):
        if weight_N is not None:
            weight_N = weight_N.detach().to(inputs.wide)
            product = weight_N if product is None else product * weight_N
    return product if product is None or rows_K is None else product[rows_K]
