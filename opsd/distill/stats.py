"""Token statistics, streamed: one projection per model and chunk, no gradient, nothing of size N×V."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opsd.distill.chunks import ChunkTokens, attempts
from opsd.distill.held import HeldLogits
from opsd.distill.inputs import Inputs, LossSpec, check_inputs
from opsd.distill.logits import Logits
from opsd.distill.rows import projected, score_
from opsd.selection import (
    ALL_STATISTICS,
    GIVEN_FIELDS,
    REQUIRED_FIELDS,
    SAMPLED_FIELDS,
    STOP_FIELDS,
    TEACHER_FIELDS,
    TokenStats,
)
from opsd.types import Head
from opsd.utils.distributed import Ranks
from opsd.utils.errors import UserError

# Rows whose exponentials exist at once while the stop probabilities are computed.
STOP_ROWS = 64


@torch.no_grad()
def token_stats(
    student_hidden_ND: Tensor,
    student_head_VD: Tensor | Head,
    teacher_hidden_NE: Tensor,
    teacher_head_VE: Tensor | Head,
    *,
    rollout_N: Tensor | None = None,
    token_ids_N: Tensor | None = None,
    needs: frozenset[str] | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    chunk_tokens: ChunkTokens = "auto",
) -> TokenStats:
    """Per-token entropies and divergences of two models over their shared vocabulary.

    needs: `TokenStats` fields to compute; None: its five required ones (the others only on request; some need
    token_ids_N). Without a teacher field the teacher is not projected.
    Other arguments as in `distill_loss`. Values in nats; paper Eq. 2 (without its 1/log|V|) and 3.
    Errors: UserError for an unknown field or shapes that do not fit.
    """
    models = (student_hidden_ND, student_head_VD, teacher_hidden_NE, teacher_head_VE)
    inputs = check_inputs(*models, vocab_size=vocab_size, rollout_N=rollout_N, token_ids_N=token_ids_N)
    spec = LossSpec(temperature=temperature, chunk_tokens=chunk_tokens)
    return build_stats(
        inputs, score_rows(inputs, check_needs(REQUIRED_FIELDS if needs is None else needs, inputs), spec)
    )


def check_needs(needs: frozenset[str], inputs: Inputs) -> frozenset[str]:
    """The fields of `needs` that must be computed. Raises UserError for one that cannot be."""
    unknown = needs - ALL_STATISTICS.keys() - GIVEN_FIELDS
    if unknown:
        known = ", ".join(sorted(ALL_STATISTICS))
        raise UserError(f"unknown statistic {sorted(unknown)[0]!r}: ask for {known}")
    if sampled := sorted(needs & SAMPLED_FIELDS):
        ids_N, vocab_size = inputs.token_ids_N, inputs.vocab_size
        if ids_N is None:
            raise UserError(f"{sampled[0]} needs the sampled tokens: give token_ids_N")
        if ids_N.numel() and not 0 <= int(ids_N.min()) <= int(ids_N.max()) < vocab_size:
            raise UserError(f"token_ids_N reach beyond the shared vocabulary of {vocab_size}: check the tokenizers")
    if needs & STOP_FIELDS and not inputs.stops.ids:
        raise UserError(f"{min(needs & STOP_FIELDS)} needs to know which tokens end a turn: give stops")
    return needs - GIVEN_FIELDS


@torch.no_grad()
def score_rows(
    inputs: Inputs, needs: frozenset[str], spec: LossSpec, kept_K: Tensor | None = None, held: HeldLogits | None = None
) -> dict[str, Tensor]:
    """The named fields [N]. With kept_K (row numbers) only those rows are scored; the others hold NaN (or 0).

    held: all rows' logits, which are not changed. Without them rows are projected chunk by chunk.
    """
    rows, teacher = inputs.rows if kept_K is None else kept_K.shape[0], bool(needs & TEACHER_FIELDS)
    fields, ids_N = {name: _blank(name, inputs) for name in needs}, inputs.scored_ids_N

    def scored(logits: Logits, ids_C: Tensor | None) -> dict[str, Tensor]:
        stops = _stop_fields(needs, inputs, logits, spec.temperature)
        # score_ overwrites the logits, unless they are held.
        return stops | score_(needs - STOP_FIELDS, logits, spec.temperature, ids_C)

    if not fields or not rows:
        return fields
    if held is not None:
        teacher_NW = held.work.teacher_CV if teacher else None
        return scored(Logits(held.work, held.work.student_CV, teacher_NW, held=True), ids_N)
    for attempt in attempts(spec.chunk_tokens, rows, inputs.vocab_size, inputs.student_ND, inputs.wide):
        logits = None  # frees those of an attempt that ran out of memory
        with attempt as chunk, torch.autocast(inputs.student_ND.device.type, enabled=False):
            for _, where, logits in projected(inputs, kept_K, chunk, teacher):
                for name, values_C in scored(logits, None if ids_N is None else ids_N[where]).items():
                    fields[name][where] = values_C
    return fields


def _stop_fields(needs: frozenset[str], inputs: Inputs, logits: Logits, temperature: float) -> dict[str, Tensor]:
    """The `STOP_FIELDS` named in `needs` [C], from logits, which are not changed."""
    student, teacher = inputs.transforms
    models = {
        "stop_log_prob_N": (student, logits.student_CW),
        "teacher_stop_log_prob_N": (teacher, logits.teacher_CW),
    }
    found = {}
    for name in needs & STOP_FIELDS:
        transform, products_CW = models[name]
        assert products_CW is not None
        parts = []
        for products_BW in products_CW.split(STOP_ROWS):
            logits_BV = transform(products_BW[:, : inputs.vocab_size]) / temperature
            ends_BE = torch.stack([logits_BV[:, token] for token in inputs.stops.ids], -1)
            parts.append(ends_BE.logsumexp(-1) - logits_BV.logsumexp(-1))
        found[name] = torch.cat(parts)
    return found


def stop_metrics(stats: TokenStats, kept_N: Tensor) -> dict[str, float]:
    """How likely both models are to end a turn, and whether its end is trained on; empty if no token ended a turn.

    stop/student_prob, stop/teacher_prob: mean probability of a stop where the turn ended; …_before: at other tokens.
    stop/delta_nats: median over the ends of the teacher's log-probability of a stop minus the student's.
    stop/kept_frac: fraction of the ends that were trained on. stop/count: number of ends.
    """
    stop_N = stats.stop_N
    if stop_N is None or stats.stop_log_prob_N is None or stats.teacher_stop_log_prob_N is None or not stop_N.any():
        return {}
    metrics = {
        "stop/count": int(stop_N.sum()),
        "stop/kept_frac": float(kept_N.to(stop_N.device)[stop_N].float().mean()),
    }
    for log_prob_N, at, before in (
        (stats.stop_log_prob_N, "stop/student_prob", "stop/student_prob_before"),
        (stats.teacher_stop_log_prob_N, "stop/teacher_prob", "stop/teacher_prob_before"),
    ):
        metrics[at] = float(log_prob_N[stop_N].exp().mean())
        if not stop_N.all():
            metrics[before] = float(log_prob_N[~stop_N].exp().mean())
    metrics["stop/delta_nats"] = float((stats.teacher_stop_log_prob_N - stats.stop_log_prob_N)[stop_N].median())
    return metrics


def _blank(name: str, inputs: Inputs) -> Tensor:
    dtype = ALL_STATISTICS[name].dtype
    fill = float("nan") if dtype.is_floating_point else 0
    return torch.full((inputs.rows,), fill, dtype=dtype, device=inputs.student_ND.device)


def build_stats(inputs: Inputs, fields: dict[str, Tensor]) -> TokenStats:
    """TokenStats from the computed fields; the others are None."""
    values: dict[str, Any] = {name: fields.get(name) for name in ALL_STATISTICS}
    known: dict[str, Any] = {"token_ids_N": inputs.token_ids_N, "stop_N": inputs.stop_N}
    return TokenStats(rollout_N=inputs.rollout_N, vocab_size=inputs.vocab_size, **known, **values)


def concatenate_stats(parts: Sequence[TokenStats]) -> TokenStats:
    """The statistics of several micro-batches as one, on the first one's device.

    A field is None if any part lacks it. Errors: UserError if there is no part.
    """
    if not parts:
        raise UserError("no statistics to join: give at least one micro-batch's")
    device = parts[0].rollout_N.device
    joined: dict[str, Any] = {}
    for field in dataclasses.fields(TokenStats):
        values = [getattr(part, field.name) for part in parts]
        whole = field.name != "vocab_size" and all(value is not None for value in values)
        joined[field.name] = torch.cat([value.to(device) for value in values]) if whole else None
    return TokenStats(**joined | {"vocab_size": parts[0].vocab_size})


def join_ranks(parts: Sequence[TokenStats], ranks: Ranks) -> TokenStats:
    """The whole step's statistics, on every rank; a field is None if any micro-batch of any rank lacks it."""
    own = concatenate_stats(parts)
    fields = {name: value for name, value in vars(own).items() if isinstance(value, Tensor)}
    common = set.intersection(*ranks.gather(set(fields)))
    joined = {name: ranks.concatenate(fields[name]) if name in common else None for name in sorted(fields)}
    return dataclasses.replace(own, **joined)  # pyrefly: ignore[bad-argument-type]
