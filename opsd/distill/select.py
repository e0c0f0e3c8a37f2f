"""The one place that calls a selector: score → choose → weigh, over one micro-batch.

Legend: N student tokens, K kept of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from opsd.distill.held import HeldLogits, hold_logits
from opsd.distill.inputs import Inputs, LossSpec, on_rows
from opsd.distill.stats import build_stats, check_needs, join_ranks, score_rows
from opsd.selection import TEACHER_FIELDS, Selection, TokenSelector, TokenStats
from opsd.utils.distributed import Ranks
from opsd.utils.errors import RunStopped, UserError, first_line, is_out_of_memory

StopToken = Literal["as_scored", "always", "never"]


@dataclass(frozen=True)
class Choice:
    """Which rows are trained on: those of `selection`, else those that `selector` keeps, else all.

    seed: decides random choices. watch: further fields to report over all rows. whole_step: these are all rows of the
    step, so scope "batch" is fitted on them here. stop_token: see `with_stops`.
    """

    selector: TokenSelector | None = None
    selection: Selection | None = None
    seed: int = 0
    watch: frozenset[str] = frozenset()
    whole_step: bool = False
    stop_token: StopToken = "as_scored"


def choose(
    inputs: Inputs, choice: Choice, spec: LossSpec, known: dict[str, Tensor] | None = None
) -> tuple[TokenStats, Selection, HeldLogits | None]:
    """The selection with its weights, the statistics it was made from, and the logits if they are held.

    known: statistics [N] that are computed already.
    """
    selector, known = choice.selector, known or {}
    needs = frozenset() if selector is None else check_needs(selector.needs, inputs) - known.keys()
    held = None
    if needs and spec.memory == "fused":
        held = hold_logits(inputs, spec, teacher=bool(needs & TEACHER_FIELDS))
    fields = known | score_rows(inputs, needs, spec, held=held)
    watched = check_needs(choice.watch, inputs) - fields.keys()
    # Watched fields must not change training by a single bit: they do not affect which logits are held.
    readable = held is not None and (held.has_teacher or not watched & TEACHER_FIELDS)
    fields |= score_rows(inputs, watched, spec, held=held if readable else None)
    stats = build_stats(inputs, fields)
    if selector is None:
        everything = Selection(_all_rows(inputs))
        return stats, choice.selection or with_stops(everything, stats, choice.stop_token), held
    if choice.whole_step and selector.normalise_over == "batch":
        prepare(selector, stats)
    selection = pick(selector, stats, choice.seed, choice.stop_token)
    return *_weigh(inputs, selector, stats, selection, spec), held


def choose_beforehand(
    selector: TokenSelector, scored: list[TokenStats], ranks: Ranks, seed: int, stop_token: StopToken = "as_scored"
) -> list[Selection]:
    """The selections, with their weights, of a step's micro-batches, from the statistics of all of them."""
    if selector.normalise_over == "batch":
        prepare(selector, join_ranks(scored, ranks))
    return [weigh(selector, stats, pick(selector, stats, seed, stop_token)) for stats in scored]


def pick(selector: TokenSelector, stats: TokenStats, seed: int, stop_token: StopToken = "as_scored") -> Selection:
    """The selector's choice, `with_stops`. Raises UserError if it is not a Selection, RunStopped if the rule fails."""
    with _rule(selector):
        selection: object = selector(stats, seed)
    if not isinstance(selection, Selection):
        name, kind = type(selector).__name__, type(selection).__name__
        raise UserError(f"selector {name} returned {kind}; its __call__ must return a Selection")
    return with_stops(selection, stats, stop_token)


def with_stops(selection: Selection, stats: TokenStats, stop_token: StopToken) -> Selection:
    """The selection, in which tokens that end a turn are kept as the rule chose, always, or never."""
    stop_N = stats.stop_N
    if stop_token == "as_scored" or stop_N is None:
        return selection
    kept_N = selection.kept_N
    stop_N = stop_N.to(kept_N.device)
    return dataclasses.replace(selection, kept_N=kept_N | stop_N if stop_token == "always" else kept_N & ~stop_N)


def weigh(selector: TokenSelector, stats: TokenStats, selection: Selection) -> Selection:
    """The selection with the weights that the selector computes from its `needs_kept` fields, if it has any."""
    with _rule(selector):
        return selector.weigh(stats, selection) if selector.needs_kept else selection


def prepare(selector: TokenSelector, stats: TokenStats) -> None:
    """Let a selector of scope "batch" see the whole step."""
    with _rule(selector):
        selector.prepare(stats)


@contextlib.contextmanager
def _rule(selector: TokenSelector) -> Iterator[None]:
    """Around a selector's code, which may be the user's: if it fails, RunStopped says which one and where."""
    try:
        yield
    except (UserError, RunStopped):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise RunStopped(
            f"selector {type(selector).__name__} failed ({type(error).__name__}: {first_line(error)}; {at.filename} "
            f"line {at.lineno})"
        ) from error


def mask_of(kept_N: Tensor, inputs: Inputs) -> Tensor:
    """A bool mask [N] on the rows' device. Raises UserError for another type or length."""
    if kept_N.dtype != torch.bool:
        raise UserError(f"kept_N has type {kept_N.dtype}: give one bool per token")
    mask_N = on_rows("kept_N", kept_N, inputs.student_ND)
    assert mask_N is not None
    return mask_N


def _weigh(
    inputs: Inputs, selector: TokenSelector, stats: TokenStats, selection: Selection, spec: LossSpec
) -> tuple[TokenStats, Selection]:
    """Score the kept rows for the `needs_kept` fields that are still missing, then `weigh`."""
    missing = frozenset(name for name in selector.needs_kept if getattr(stats, name) is None)
    if missing := check_needs(missing, inputs):
        kept_K = mask_of(selection.kept_N, inputs).nonzero().squeeze(-1)
        stats = dataclasses.replace(stats, **score_rows(inputs, missing, spec, kept_K))  # pyrefly: ignore[bad-argument-type]
    return stats, weigh(selector, stats, selection)


def _all_rows(inputs: Inputs) -> Tensor:
    return torch.ones(inputs.rows, dtype=torch.bool, device=inputs.student_ND.device)
