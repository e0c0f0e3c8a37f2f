"""TRL's chunked loss on selected tokens, computed by TRL's own kernel or by ours.

Legend: B answers of a micro-batch, L its longest answer, N tokens that the student wrote, K kept ones, D and E the
models' hidden sizes, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.trainer.distillation_trainer import _chunked_divergence_loss
from trl.trainer.utils import maybe_gather_lm_head_ctx

from opsd.distill.inputs import Inputs, LossSpec, check_inputs
from opsd.distill.loss import distill
from opsd.distill.select import Choice, choose, mask_of
from opsd.distill.stats import build_stats, check_needs, score_rows
from opsd.selection import TokenStats, field_of
from opsd.types import Head, Stops, Transform

# What TRL's loss function returns: the loss, the sum of the student's entropies over all tokens, and their number.
Returned = tuple[Tensor, Tensor, Tensor]
# Key in TRL's micro-batches: the ids of the answers.
ROLLOUT = "tip_rollout"
SIGNATURE = inspect.signature(_chunked_divergence_loss)
CONTEXT = ("dtypes", "beta", "mode", "kernel_args", "needs_input_grad")
SAVED = 9


class KeptRowsDivergence(ChunkedDivergenceFunction):
    """TRL's divergence and entropy per token, with a backward over only those rows that receive a gradient."""

    @staticmethod
    def backward(ctx: Any, grad_divergence: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        if grad_divergence is None:
            return (None,) * len(ctx.needs_input_grad)
        row_K = grad_divergence.nonzero().squeeze(-1)
        student_ND, student_head, student_bias, teacher_NE, *teacher_head_and_bias, log_z_N, teacher_log_z_N, aux_N = (
            ctx.saved_tensors
        )
        kept = SimpleNamespace(
            saved_tensors=(
                student_ND[row_K],
                student_head,
                student_bias,
                teacher_NE[row_K],
                *teacher_head_and_bias,
                log_z_N[row_K],
                teacher_log_z_N[row_K],
                aux_N[row_K],
            ),
            **{name: getattr(ctx, name) for name in CONTEXT},
        )
        grad_KD, *others = ChunkedDivergenceFunction.backward(kept, grad_divergence[row_K], None)
        if grad_KD is None:
            return None, *others
        return torch.zeros_like(student_ND).index_copy_(0, row_K, grad_KD), *others


@dataclass(frozen=True)
class Call:
    """A call of TRL's loss function on a micro-batch.

    own: that function. arguments, named: its arguments. rollout_B: the answers' ids. ids_BL: their tokens.
    stops: the tokens that end an answer.
    """

    own: Callable[..., Returned]
    arguments: inspect.BoundArguments
    rollout_B: Tensor
    ids_BL: Tensor
    stops: Stops

    @classmethod
    def of(cls, own: Callable[..., Returned], micro: dict[str, Any], stops: Stops, args: Any, named: Any) -> Call:
        """A call, with defaults for arguments that were left out. micro: TRL's micro-batch."""
        arguments = SIGNATURE.bind(*args, **named)
        arguments.apply_defaults()
        return cls(own, arguments, micro[ROLLOUT], micro["completion_ids"], stops)

    @cached_property
    def named(self) -> SimpleNamespace:
        """The arguments by name; weights and biases are gathered if FSDP2 has sharded them."""
        found = SimpleNamespace(**self.arguments.arguments)
        for side in ("student", "teacher"):
            weight, hidden = getattr(found, f"{side}_lm_head_weight"), getattr(found, f"{side}_hidden_states")
            bias = getattr(found, f"{side}_lm_head_bias")
            if isinstance(weight, DTensor):
                setattr(found, f"{side}_lm_head_weight", weight.full_tensor().to(hidden.dtype))
                setattr(found, f"{side}_lm_head_bias", None if bias is None else bias.full_tensor())
        return found

    @cached_property
    def rows_N(self) -> Tensor:
        """Indices of the student's tokens among the B·L positions."""
        return self.named.completion_mask.reshape(-1).nonzero().squeeze(-1)

    def at_rows(self, values_BL: Tensor) -> Tensor:
        """The values at the student's tokens [N, …]."""
        return values_BL.flatten(0, 1).to(self.rows_N.device)[self.rows_N]

    @contextmanager
    def inputs(self) -> Iterator[Inputs]:
        """The inputs of our loss core; under ZeRO-3 the heads are gathered within this context."""
        a = self.named
        rollout_BL = self.rollout_B[:, None].expand_as(self.ids_BL)
        with (
            maybe_gather_lm_head_ctx(a.student_lm_head_weight, a.student_lm_head_bias),
            maybe_gather_lm_head_ctx(a.teacher_lm_head_weight, a.teacher_lm_head_bias),
        ):
            yield check_inputs(
                self.at_rows(a.student_hidden_states),
                self._head("student"),
                self.at_rows(a.teacher_hidden_states),
                self._head("teacher"),
                rollout_N=self.at_rows(rollout_BL),
                token_ids_N=self.at_rows(self.ids_BL),
                stops=self.stops,
            )

    def _head(self, side: str) -> Head:
        """A model's projection to logits, as TRL read it from the model's configuration."""
        a = vars(self.named)
        transform = Transform(a[f"{side}_logit_scale"], a[f"{side}_final_logit_softcapping"])
        return Head(a[f"{side}_lm_head_weight"], a[f"{side}_lm_head_bias"], transform)

    def divergence(self) -> tuple[Tensor, Tensor]:
        """Divergence and student entropy of each token [N], by TRL's kernel; the divergence is differentiable."""
        a = self.named
        return KeptRowsDivergence.apply(
            self.at_rows(a.student_hidden_states),
            a.student_lm_head_weight,
            a.student_lm_head_bias,
            self.at_rows(a.teacher_hidden_states),
            a.teacher_lm_head_weight,
            a.teacher_lm_head_bias,
            a.beta,
            a.temperature,
            a.student_logit_scale,
            a.student_final_logit_softcapping,
            a.teacher_logit_scale,
            a.teacher_final_logit_softcapping,
        )

    def divide(self, loss_sum: Tensor, kept: Tensor | None) -> Tensor:
        """Divide by the step's count that TRL was given, or by `kept` if this is the step's only call."""
        count = self.named.num_items_in_batch if kept is None else kept.clamp(min=1)
        return loss_sum / (count.to(loss_sum.device) if isinstance(count, Tensor) else count)

    def return_zeros(self) -> Returned:
        """What to return if nothing reads the loss."""
        zero = torch.zeros((), device=self.ids_BL.device)
        return zero, zero, zero


@dataclass(frozen=True)
class Selected:
    """The result of a call: the mask [N], and the statistics computed on the way. It holds no graph."""

    kept_N: Tensor
    stats: TokenStats


def score(call: Call, needs: frozenset[str], spec: LossSpec) -> TokenStats:
    """The named statistics of a call's tokens."""
    with call.inputs() as inputs, _no_autocast(inputs):
        return build_stats(inputs, score_rows(inputs, check_needs(needs, inputs), spec))


def kernel_loss(call: Call, choice: Choice, spec: LossSpec) -> tuple[Returned, Selected]:
    """The loss by TRL's kernel: bit for bit what TRL computes if every token is kept."""
    with call.inputs() as inputs:
        found = None if choice.selector is None and choice.selection is None else call.divergence()
        known = {} if found is None else _free(*found, spec)
        with _no_autocast(inputs):
            stats, selection, _ = choose(inputs, choice, spec, known)
        kept_N, weight_N = mask_of(selection.kept_N, inputs), selection.weight_N
    if found is None or (weight_N is None and bool(kept_N.all())):
        return call.own(*call.arguments.args, **call.arguments.kwargs), Selected(kept_N, stats)
    divergence_N, entropy_N = found
    # Indexed, not multiplied by the mask: 0 times a value that is not finite would be NaN.
    picked_K = divergence_N[kept_N] if weight_N is None else divergence_N[kept_N] * weight_N[kept_N]
    loss = call.divide(picked_K.sum(), _own_count(choice, kept_N))
    return (loss, entropy_N.sum(), torch.tensor(inputs.rows, device=loss.device)), Selected(kept_N, stats)


def fused_loss(call: Call, choice: Choice, spec: LossSpec) -> tuple[Returned, Selected]:
    """The loss by our core, which forms loss and gradients in one pass. The entropy is NaN if nothing reads it."""
    with call.inputs() as inputs:
        result = distill(inputs, choice, spec)
    loss = call.divide(result.loss_sum, _own_count(choice, result.kept_N))
    entropy_N = result.stats.entropy_N
    entropy = loss.new_tensor(torch.nan) if entropy_N is None else entropy_N.sum()
    returned = loss, entropy, torch.tensor(inputs.rows, device=loss.device)
    return returned, Selected(result.kept_N, result.stats)


ENGINES = {"kernel": kernel_loss, "fused": fused_loss}


def _free(divergence_N: Tensor, entropy_N: Tensor, spec: LossSpec) -> dict[str, Tensor]:
    """The statistics that come with TRL's divergence, clamped at 0: rounding may put them slightly below."""
    found, field = {"entropy_N": entropy_N.clamp_min(0.0)}, field_of(spec.divergence)
    if field is not None:
        found[field] = divergence_N.detach().clamp_min(0.0)
    return found


def _own_count(choice: Choice, kept_N: Tensor) -> Tensor | None:
    """The kept count, if it was not known beforehand and these are all of the step's tokens; else None."""
    selector = choice.selector
    return kept_N.sum() if choice.whole_step and selector is not None and not selector.fixed_budget else None


def _no_autocast(inputs: Inputs) -> torch.autocast:
    """Autocast off: the inputs say in which dtype products are computed."""
    return torch.autocast(inputs.student_ND.device.type, enabled=False)
