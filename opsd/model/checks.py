"""What is measured on a loaded model before it serves. Every check raises UserError, one line, where it does not hold.

Nothing here goes by a model's name: what its configuration says is only where to look.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel

from opsd.model.attention import compute_dtype
from opsd.model.scorer import Scorer, body_of
from opsd.types import MicroBatch, Transform
from opsd.utils.errors import UserError

# Two ways to the same hidden states: relative difference that rounding explains, over BLOCK tokens. In bfloat16 a
# router may now and then choose another expert for a token.
ALLOWED = {torch.float32: 1e-3, torch.float64: 1e-3}
ALLOWED_ROUNDED, BLOCK = 0.25, 16
# Lengths of the first probe, and tokens by which a probe passes a switch.
SHORT, BEYOND = (16, 5), 16
# Words in the names of settings whose values are lengths at which a model may change what it does; in a packed row
# positions begin anew with every sequence, its own length can only matter to what goes by places in the row.
PLACES, SWITCHES = ("window", "chunk"), ("window", "chunk", "position", "length", "context")
# What configurations call the number of positions that a model was made for.
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "max_seq_length",
             "seq_length", "model_max_length", "n_ctx")  # fmt: skip


@dataclass(frozen=True)
class Span:
    """A prompt's and a response's longest, in tokens. flag: the option that sets the response's. shorter: what to
    give where the prompt alone is too long."""

    prompt: int
    response: int
    flag: str = "--rollout.max_new_tokens"
    shorter: str = "give shorter prompts"


@dataclass(frozen=True)
class Reach:
    """How far a run goes. spans: its longest sequences, in training and evaluation. row: tokens of a packed row."""

    spans: tuple[Span, ...] = ()
    row: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max((span.prompt + span.response for span in self.spans), default=0)


# ---- the head


@torch.no_grad()
def find_transform(model: PreTrainedModel, name: str) -> Transform:
    """What a model does to its head's output: measured, and proven on logits of its own.

    Raises UserError where it is more than a scale and a soft cap.
    """
    check_head_alone(model.get_output_embeddings(), name)
    return transform_of(model, name)


@torch.no_grad()
def check_head_alone(head: Any, name: str) -> None:
    """Make sure that the head is a product with its weight [V, D], plus its bias if any. Raises UserError."""
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    if not (isinstance(weight, Tensor) and weight.dim() == 2 and weight.dtype.is_floating_point):
        raise UserError(f"{name}: its head is not a plain matrix ({type(head).__name__}); this trainer needs one")
    given = torch.linspace(-1, 1, 4 * weight.shape[1], dtype=weight.dtype, device=weight.device)
    given_LD = given.view(4, -1)
    ours = functional.linear(given_LD, weight, bias)
    _check_finite(ours, name)
    if not _alike(head(given_LD), ours):
        raise _unknown(name)


@torch.no_grad()
def transform_of(model: PreTrainedModel, name: str) -> Transform:
    """See `find_transform`, of a model whose head was checked. It is run three times, on four tokens."""
    ids = torch.arange(4, device=model.device)[None] % model.config.get_text_config().vocab_size
    head: Any = model.get_output_embeddings()
    model.eval()
    # Numbers in the head's place show what becomes of each.
    given: list[Tensor] = []
    replaced = head.register_forward_hook(lambda _module, _inputs, output: given.append(_ladder(output)) or given[0])
    try:
        seen = model(input_ids=ids, use_cache=False).logits
    finally:
        replaced.remove()
    own, output = (
        model(input_ids=ids, use_cache=False).logits,
        head(body_of(model)(input_ids=ids, use_cache=False).last_hidden_state),
    )
    _check_finite(output, name)
    transform = _fit(given[0], seen)
    if transform is None or not _alike(own, transform(output)):
        raise _unknown(name)
    return transform


def _ladder(like: Tensor) -> Tensor:
    """Numbers of both signs from 2^-10 to 2^20, in fp64 and the shape of a head's output; bfloat16 has each of them."""
    steps = torch.logspace(-10, 20, like.numel() // 2 + 1, base=2.0, dtype=torch.float64, device=like.device)
    return torch.stack([-steps, steps], 1).flatten()[-like.numel() :].view(like.shape).bfloat16().double()


def _fit(given: Tensor, seen: Tensor) -> Transform | None:
    """The transform that made `seen` of `given`, a `_ladder`; None where none does, to five digits."""
    if seen.shape != given.shape:
        return None
    given, seen = given.flatten(), seen.double().flatten()
    top, highest, tenth = float(given[-1]), float(seen[-1]), float(seen[(given - given[-1] / 10).abs().argmin()])
    if not highest > 0.0:
        return None
    if highest > 2 * tenth:
        cap, scale = None, highest / top
    else:
        # A cap. What comes out says most of the scale where it is half of it.
        middle = int((seen / highest - 0.5).abs().argmin())
        cap, scale = highest, math.atanh(min(float(seen[middle]) / highest, 0.99)) * highest / float(given[middle])
    # What is 1 is to be 1, whatever rounding has made of it.
    found = Transform(float(f"{scale:.9g}"), cap)
    fits = found.scale > 0.0 and torch.allclose(found(given), seen, rtol=1e-5, atol=0.0)
    return found if fits else None


def _check_finite(logits: Tensor, name: str) -> None:
    if not torch.isfinite(logits).all():
        raise UserError(f"{name}: its logits are not finite; the weights are damaged, give another copy")


def _alike(own: Tensor, ours: Tensor) -> bool:
    """Whether two ways to the same products agree, as far as their type lets them."""
    allowed = 1e-4 if compute_dtype(ours) == torch.float32 else 1e-2
    return torch.allclose(own.float(), ours.float(), rtol=allowed, atol=allowed * float(ours.abs().max()))


def _unknown(name: str) -> UserError:
    return UserError(
        f"{name}: its logits are not hidden·head + bias, scaled and soft-capped; this trainer supports nothing else"
    )


# ---- sequences of a micro-batch


@torch.no_grad()
def check_packing(scorer: Scorer, name: str, reach: Reach | None = None) -> None:
    """Make sure that the sequences of a micro-batch stay apart in the layout that the scorer uses.

    reach: how far the run goes; every length within it at which the configuration says that something changes is
    tested on both sides. Raises UserError where a sequence's hidden states change with those beside it.
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
    """Lengths of sequences to lay side by side: short ones, then both sides of every switch that a run can reach."""
    yield SHORT
    # More than a model has positions for is refused elsewhere, in a line that says so.
    longest = min(reach.longest, positions(config) or reach.longest)
    for switch in switches(config, longest):
        yield min(longest, switch + BEYOND), min(longest, switch + BEYOND // 2), switch, SHORT[-1]
    if packed and longest:
        # A row may pass what none of its sequences does.
        for switch in switches(config, reach.row, PLACES):
            if switch >= longest:
                yield (longest,) * (switch // longest + 2)


def switches(config: PretrainedConfig, below: int, words: tuple[str, ...] = SWITCHES) -> list[int]:
    """The lengths, in tokens, at which a model may change what it does: the configuration's, 1 to `below` - 1."""
    return sorted({value for value in _lengths(config.get_text_config().to_dict(), words) if 1 <= value < below})


@torch.no_grad()
def length_switches(model: PreTrainedModel, longest: int) -> frozenset[int]:
    """Lengths, in tokens, past which a model gives other hidden states for all of a sequence (LongRoPE does).

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
    """Whole numbers of a configuration whose names hold one of `words`."""
    if isinstance(settings, dict):
        for key, value in settings.items():
            yield from _lengths(value, words, any(word in str(key) for word in words))
    elif isinstance(settings, list):
        for value in settings:
            yield from _lengths(value, words, counts)
    elif counts and type(settings) is int:
        yield settings


def _leak(scorer: Scorer, lengths: tuple[int, ...]) -> tuple[float, float]:
    """How much sequences of these lengths change beside each other, and how much rounding may change them."""
    micro = _side_by_side(lengths, scorer.model)
    ids = micro.input_ids_1L[0].split(lengths)
    # The shortest first: a model that remembers the longest that it has seen has then seen none.
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    alone = {place: scorer.hidden_alone(ids[place]) for place in order}
    together = scorer.hidden(micro).split(lengths)
    worst = max(difference(hidden_LD, alone[place]) for place, hidden_LD in enumerate(together))
    return worst, ALLOWED.get(compute_dtype(together[0]), ALLOWED_ROUNDED)


def _side_by_side(lengths: tuple[int, ...], model: PreTrainedModel) -> MicroBatch:
    """A micro-batch of sequences with these lengths, every row of it asked for."""
    positions = torch.cat([torch.arange(length) for length in lengths])
    ids = torch.arange(len(positions)) % model.config.get_text_config().vocab_size
    owners = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return MicroBatch(ids[None], positions[None], torch.arange(len(ids)), ids, owners).to(model.device)


def difference(ours_LD: Tensor, own_LD: Tensor) -> float:
    """The largest relative difference over BLOCK tokens in a row: a change of a few tokens is not diluted."""
    blocks = zip(ours_LD.float().split(BLOCK), own_LD.float().split(BLOCK), strict=True)
    found = [float((ours - own).norm() / own.norm().clamp(min=1e-12)) for ours, own in blocks]
    return max(one if one == one else float("inf") for one in found)


@torch.no_grad()
def check_causal(scorer: Scorer, name: str) -> None:
    """Make sure that no token changes what stands before it. Raises UserError."""
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
    """Make sure that a model gives in training what it gives in evaluation, time and again. Raises UserError."""
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


# ---- positions


def check_positions(config: PretrainedConfig, spans: tuple[Span, ...], name: str) -> None:
    """Raises UserError where a prompt and its response may be longer than a model has positions for.

    Past them it fails, or writes nonsense that would be trained on or count as its score.
    """
    known = positions(config)
    for span in spans:
        if known is not None and span.prompt + span.response > known:
            room = known - span.prompt
            fix = f"give at most {room}" if room > 0 else span.shorter
            raise UserError(
                f"{span.flag} {span.response} and a prompt of {span.prompt} tokens are over the {known} positions of "
                f"{name}; {fix}"
            )


def positions(config: PretrainedConfig) -> int | None:
    """How many positions a model was made for, rope scaling included; None where nothing says so."""
    text = config.get_text_config()
    named = [getattr(text, name, None) for name in POSITIONS]
    known = next((value for value in named if type(value) is int and value > 0), None)
    if known is None:
        return None
    return max([known, *(int(scaled) for scaled in _scaled(text, known))])


def rope_switch(config: PretrainedConfig) -> int | None:
    """The length past which rotary positions depend on it, by the configuration; None where they never do.

    For a model that cannot be measured here, as one that is served.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    for one in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if one.get("rope_type") in ("longrope", "dynamic"):
            return one.get("original_max_position_embeddings") or positions(config)
    return None


def _scaled(text: PretrainedConfig, known: int) -> Iterator[float]:
    """What rope scaling stretches the positions to, for each kind of layer."""
    rope = getattr(text, "rope_parameters", None) or {}
    for one in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if one.get("rope_type") in ("linear", "dynamic", "yarn") and one.get("factor"):
            yield one["factor"] * (one.get("original_max_position_embeddings") or known)
