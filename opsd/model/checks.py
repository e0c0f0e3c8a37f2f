"""Checks on a loaded model before it is used, by measuring. A check that fails raises UserError, in one line.

Nothing here depends on a model's name; its configuration only says which lengths to test.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from opsd.model.attention import compute_dtype
from opsd.model.positions import Span, positions
from opsd.model.scorer import Scorer, body_of
from opsd.types import MicroBatch
from opsd.utils.errors import UserError

# Relative difference over BLOCK tokens that rounding explains, between two computations of the same hidden states. In
# bfloat16 a router may occasionally choose another expert for a token.
ALLOWED = {torch.float32: 1e-3, torch.float64: 1e-3}
ALLOWED_ROUNDED, BLOCK = 0.25, 16
# Sequence lengths of the first probe, and by how many tokens a probe exceeds a switch.
SHORT, BEYOND = (16, 5), 16
# Words in the names of settings whose values are switches: lengths at which a model's behaviour may change. In a packed
# row positions restart with every sequence, so the row's own length matters only to settings that count its tokens.
PLACES, SWITCHES = ("window", "chunk"), ("window", "chunk", "position", "length", "context")


@dataclass(frozen=True)
class Reach:
    """Lengths a run reaches. spans: its longest sequences, in training and evaluation. row: tokens of a packed row."""

    spans: tuple[Span, ...] = ()
    row: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max((span.prompt + span.response for span in self.spans), default=0)


@torch.no_grad()
def check_packing(scorer: Scorer, name: str, reach: Reach | None = None) -> None:
    """Make sure that the sequences of a micro-batch stay apart in the layout that the scorer uses.

    reach: the lengths that the run reaches; every switch that the configuration names within them is tested on both
    sides. Raises UserError if a sequence's hidden states depend on the other sequences.
    """
    scorer.eval()
    for lengths in probes(scorer.model.config, reach or Reach(), scorer.packed):
        gap, allowed = _leak(scorer, lengths)
        if gap > allowed:
            reached = "" if lengths == SHORT else f" (lengths of {', '.join(map(str, lengths))} tokens)"
            if scorer.alone:
                raise UserError(
                    f"{name}: the same sequence alone gives different hidden states each time: they depend on the "
                    f"longest sequence that the model has seen, or on chance{reached}; give shorter lengths or another "
                    "model"
                )
            where = "packed into one row" if scorer.packed else "of one batch"
            raise UserError(
                f"{name}: sequences {where} see each other{reached}; this trainer needs a model that keeps them "
                "separate"
            )


def probes(config: PretrainedConfig, reach: Reach, packed: bool) -> Iterator[tuple[int, ...]]:
    """Lengths of the sequences of each probe: short ones, then both sides of every switch that a run can reach."""
    yield SHORT
    # Lengths beyond a model's positions are refused elsewhere, with a message that says so.
    longest = min(reach.longest, positions(config) or reach.longest)
    for switch in switches(config, longest):
        yield min(longest, switch + BEYOND), min(longest, switch + BEYOND // 2), switch, SHORT[-1]
    if packed and longest:
        # A row may exceed a switch that none of its sequences reaches.
        for switch in switches(config, reach.row, PLACES):
            if switch >= longest:
                yield (longest,) * (switch // longest + 2)


def switches(config: PretrainedConfig, below: int, words: tuple[str, ...] = SWITCHES) -> list[int]:
    """The lengths, in tokens, at which a model's behaviour may change: those in its configuration, 1 to `below` - 1."""
    return sorted({value for value in _lengths(config.get_text_config().to_dict(), words) if 1 <= value < below})


@torch.no_grad()
def length_switches(model: PreTrainedModel, longest: int) -> frozenset[int]:
    """Lengths, in tokens, beyond which all hidden states of a sequence change (as under LongRoPE).

    Measured on both sides of every switch that its configuration names, up to `longest` tokens.
    """
    model.eval()
    found = []
    for switch in switches(model.config, min(longest, positions(model.config) or longest)):
        ids = torch.arange(switch + 1, device=model.device)[None] % model.config.get_text_config().vocab_size
        body = body_of(model)
        short_LD, long_LD = (body(input_ids=part, use_cache=False).last_hidden_state[0] for part in (ids[:, :-1], ids))
        if difference(long_LD[:-1], short_LD) > ALLOWED.get(compute_dtype(short_LD), ALLOWED_ROUNDED):
            found.append(switch)
    return frozenset(found)


def _lengths(settings: Any, words: tuple[str, ...], counts: bool = False) -> Iterator[int]:
    """Whole numbers of a configuration whose names contain one of `words`."""
    if isinstance(settings, dict):
        for key, value in settings.items():
            yield from _lengths(value, words, any(word in str(key) for word in words))
    elif isinstance(settings, list):
        for value in settings:
            yield from _lengths(value, words, counts)
    elif counts and type(settings) is int:
        yield settings


def _leak(scorer: Scorer, lengths: tuple[int, ...]) -> tuple[float, float]:
    """How much sequences of these lengths change each other's hidden states, and how much change rounding allows."""
    micro = _side_by_side(lengths, scorer.model)
    ids = micro.input_ids_1L[0].split(lengths)
    # Shortest first, for models that change once they have seen a longer sequence.
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    alone = {place: scorer.hidden_alone(ids[place]) for place in order}
    together = scorer.hidden(micro).split(lengths)
    worst = max(difference(hidden_LD, alone[place]) for place, hidden_LD in enumerate(together))
    return worst, ALLOWED.get(compute_dtype(together[0]), ALLOWED_ROUNDED)


def _side_by_side(lengths: tuple[int, ...], model: PreTrainedModel) -> MicroBatch:
    """A micro-batch of sequences with these lengths, which asks for the hidden states of all tokens."""
    positions = torch.cat([torch.arange(length) for length in lengths])
    ids = torch.arange(len(positions)) % model.config.get_text_config().vocab_size
    owners = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return MicroBatch(ids[None], positions[None], torch.arange(len(ids)), ids, owners).to(model.device)


def difference(ours_LD: Tensor, own_LD: Tensor) -> float:
    """The largest relative difference over BLOCK consecutive tokens: a change of a few tokens is not diluted."""
    blocks = zip(ours_LD.float().split(BLOCK), own_LD.float().split(BLOCK), strict=True)
    found = [float((ours - own).norm() / own.norm().clamp(min=1e-12)) for ours, own in blocks]
    return max(one if one == one else float("inf") for one in found)


@torch.no_grad()
def check_causal(scorer: Scorer, name: str) -> None:
    """Make sure that no token changes the hidden states of those before it. Raises UserError."""
    scorer.eval()
    ids = torch.arange(SHORT[0], device=scorer.model.device) % scorer.model.config.get_text_config().vocab_size
    kept = SHORT[0] // 2
    own_LD, other_LD = (scorer.hidden_alone(each)[:kept] for each in (ids, torch.cat([ids[:kept], ids[kept:].flip(0)])))
    if difference(other_LD, own_LD) > ALLOWED.get(compute_dtype(own_LD), ALLOWED_ROUNDED):
        raise UserError(
            f"{name}: its hidden states change with the tokens after them (attention in both directions); this trainer "
            "needs a causal model"
        )


# ---- training mode


@torch.no_grad()
def check_steady(scorer: Scorer, name: str) -> None:
    """Make sure that a model gives the same hidden states in training and evaluation, every time. Raises UserError."""
    micro = _side_by_side(SHORT, scorer.model)
    scorer.eval()
    own = scorer.hidden(micro)
    allowed = ALLOWED.get(compute_dtype(own), ALLOWED_ROUNDED)
    found = []
    for training in (False, True, True):
        found.append(difference(scorer.train(training).hidden(micro), own))
    scorer.eval()
    if max(found) > allowed:
        raise UserError(
            f"{name}: the same tokens give different hidden states each time, or in training (noise or dropout that "
            "cannot be turned off); this trainer needs a deterministic model"
        )
