"""How many positions a model has, and whether prompts and responses fit them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PretrainedConfig

from opsd.utils.errors import UserError

# What configurations call the number of positions that a model was made for.
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "max_seq_length",
             "seq_length", "model_max_length", "n_ctx")  # fmt: skip


@dataclass(frozen=True)
class Span:
    """Maximum lengths of a prompt and its response, in tokens. flag: the option that sets the response's. shorter: the
    advice if the prompt alone is too long."""

    prompt: int
    response: int
    flag: str = "--rollout.max_new_tokens"
    shorter: str = "give shorter prompts"


def check_positions(config: PretrainedConfig, spans: tuple[Span, ...], name: str) -> None:
    """Raises UserError if a prompt and its response may need more positions than a model has.

    Beyond them a model fails, or writes nonsense that would be trained on or graded.
    """
    known = positions(config)
    for span in spans:
        if known is not None and span.prompt + span.response > known:
            room = known - span.prompt
            fix = f"give at most {room}" if room > 0 else span.shorter
            raise UserError(
                f"{span.flag} {span.response} and a prompt of {span.prompt} tokens exceed the {known} positions of "
                f"{name}; {fix}"
            )


def positions(config: PretrainedConfig) -> int | None:
    """How many positions a model was made for, rope scaling included; None if the configuration does not say."""
    text = config.get_text_config()
    named = [getattr(text, name, None) for name in POSITIONS]
    known = next((value for value in named if type(value) is int and value > 0), None)
    if known is None:
        return None
    return max([known, *(int(scaled) for scaled in _scaled(text, known))])


def rope_switch(config: PretrainedConfig) -> int | None:
    """The sequence length beyond which rotary embeddings depend on it, by the configuration; None if there is none.

    For a model that cannot be measured here, such as a served one.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    for one in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if one.get("rope_type") in ("longrope", "dynamic"):
            return one.get("original_max_position_embeddings") or positions(config)
    return None


def _scaled(text: PretrainedConfig, known: int) -> Iterator[float]:
    """The number of positions after rope scaling, for each kind of layer."""
    rope = getattr(text, "rope_parameters", None) or {}
    for one in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if one.get("rope_type") in ("linear", "dynamic", "yarn") and one.get("factor"):
            yield one["factor"] * (one.get("original_max_position_embeddings") or known)
