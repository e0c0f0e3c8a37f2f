"""What dataclasses of settings share: bounds, given in the types of fields, and fields that several commands have."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeGuard, Union

from opsd.utils.errors import UserError

# Real settings stay far below this; a count above it would run for ever.
MOST = 2**31 - 1


@dataclass(frozen=True)
class Bound:
    """What a number may be. holds: whether a value is allowed (NaN never is). give: what the error message asks for."""

    holds: Callable[[Any], bool]
    give: str


_POSITIVE = Bound(lambda value: 0 < value <= MOST, f"a number above 0, at most {MOST}")
_NON_NEGATIVE = Bound(lambda value: 0 <= value <= MOST, f"0 or more, at most {MOST}")
PositiveInt = Annotated[int, _POSITIVE]
PositiveFloat = Annotated[float, _POSITIVE]
NonNegativeInt = Annotated[int, _NON_NEGATIVE]
NonNegativeFloat = Annotated[float, _NON_NEGATIVE]
Fraction = Annotated[float, Bound(lambda value: 0 < value <= 1, "a fraction in (0, 1], e.g. 0.5")]
FractionFromZero = Annotated[float, Bound(lambda value: 0 <= value <= 1, "a fraction in [0, 1]")]
FractionBelowOne = Annotated[float, Bound(lambda value: 0 <= value < 1, "a fraction in [0, 1)")]
ProperFraction = Annotated[float, Bound(lambda value: 0 < value < 1, "a fraction between 0 and 1")]


class Settings:
    """A dataclass of settings. Its constructor raises UserError for a value outside its field's bounds or choices.

    part: the prefix of its flags, e.g. "rollout."; the class declaration gives it without the dot.
    """

    part: ClassVar[str] = ""

    def __init_subclass__(cls, part: str = "") -> None:
        cls.part = f"{part}." if part else ""

    def __post_init__(self) -> None:
        for name, kind in fields_of(type(self)).items():
            value = getattr(self, name)
            if give := wanted(kind, value):
                raise UserError(f"--{self.part}{name} {value}: give {give}")
        self.check()

    def check(self) -> None:
        """Raises UserError if fields contradict each other."""


@cache
def fields_of(settings: type) -> dict[str, Any]:
    """The fields of a dataclass and their types, with annotations such as bounds."""
    kinds = typing.get_type_hints(settings, include_extras=True)
    return {field.name: kinds[field.name] for field in dataclasses.fields(settings)}


def required_of(settings: type) -> list[str]:
    """The names of a dataclass's fields that have no default."""
    fields, none = dataclasses.fields(settings), dataclasses.MISSING
    return [field.name for field in fields if field.default is none and field.default_factory is none]


def is_part(kind: Any) -> TypeGuard[type[Settings]]:
    """Whether a field of this type holds settings of its own."""
    return isinstance(kind, type) and issubclass(kind, Settings)


def fits(kind: Any, value: Any) -> bool:
    """Whether a value is of a field's type; bounds are not checked."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return fits(args[0], value)
    if origin in (Union, UnionType):
        return any(fits(arg, value) for arg in args)
    if origin is Literal:
        # A value that is none of the choices passes here; the constructor's error then lists the choices.
        return type(value) in {type(choice) for choice in args}
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(args[0], one) for one in value)
    if kind is float:
        return type(value) in (int, float)
    return type(value) is (origin or kind)


def wanted(kind: Any, value: Any) -> str:
    """What to give instead of `value`; "" if it is within the bounds and choices of its type."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        bounds = [bound for bound in args[1:] if isinstance(bound, Bound)]
        return next((bound.give for bound in bounds if not bound.holds(value)), "")
    if origin is Literal:
        return "" if value in args else f"one of: {', '.join(map(str, args))}"
    if origin in (Union, UnionType):
        # The type with bounds comes first, then words such as auto or None.
        words = [word for arg in args[1:] for word in typing.get_args(arg) or (None,)]
        return "" if value in words else wanted(args[0], value)
    return ""


@dataclass(frozen=True)
class LengthSettings(Settings):
    """How long a prompt and a response may be."""

    max_prompt_tokens: PositiveInt = 2048
    """Longest prompt accepted, in tokens."""
    max_new_tokens: PositiveInt = 8192
    """Longest response, in tokens; a longer one is truncated: counted as such, and wrong in an evaluation."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens that end a response, as spelled in the vocabulary, e.g. '<|im_end|>', or as ids. By default those with
    which the model ends a turn according to its generation_config, tokenizer and chat template; in training those of
    either model, and if the two models' differ the loss merges them into one token (docs/stops.md)."""


@dataclass(frozen=True)
class SamplingSettings(Settings):
    """How a response is sampled. Set here, never inherited from training or from a model's generation_config."""

    temperature: NonNegativeFloat = 1.0
    """Sampling temperature; 1.0 samples from the distribution that is trained, 0 is greedy."""
    top_p: Fraction = 1.0
    """Nucleus sampling mass; 1.0 is off."""
    top_k: NonNegativeInt = 0
    """Sample only from this many most likely tokens; 0 is off."""


@dataclass(frozen=True)
class EvaluationSettings(SamplingSettings):
    """How a suite is evaluated, during training and by `opsd eval`."""

    samples: PositiveInt = 4
    """Responses per problem (the k of mean@k); 16 in the paper."""
    generate_batch: PositiveInt = 64
    """Responses generated in one batch; `opsd eval` also grades and saves this many together."""
    limit: PositiveInt | None = None
    """Use only the first N problems of each suite."""
    grader: str = "math"
    """math: math-verify on the last boxed or final answer. suffix: the response ends with the gold answer.
    Or module:function(response, gold) -> bool."""
    seed: int = 1234
    """Sampling seed of evaluations, separate from the run's seed: all cells of a table share it."""


@dataclass(frozen=True)
class PromptSettings(Settings):
    """How records of prompt files become token ids."""

    prompt_format: Literal["chat", "raw"] = "chat"
    """chat applies the tokenizer's chat template; raw encodes the prompt as it is."""
    thinking: Literal["on", "off"] = "off"
    """Thinking mode of the chat template, the same for student and teacher."""
    prompt_field: str = "prompt"
    """Column that holds the prompt (a string or a list of chat messages)."""
    answer_field: str = "answer"
    """Column that holds the gold answer, if there is one."""

    def check(self) -> None:
        if self.thinking == "on" and self.prompt_format == "raw":
            raise UserError("--thinking on is part of a chat template; give --prompt_format chat with it")


@dataclass(frozen=True)
class StepSettings(Settings):
    """What is trained on, and how long."""

    prompts: str
    """Training prompts: a .jsonl or .parquet file, or a dataset on the hub as hub:OWNER/NAME:SPLIT or
    hub:OWNER/NAME:CONFIG:SPLIT; config.json then records its commit."""
    out: str
    """Folder to write to; a run's must be new, empty, or of a run that ended before its first step was complete."""
    steps: PositiveInt = 100
    """Optimiser steps."""
    prompts_per_step: PositiveInt = 8
    """Prompts per optimiser step."""
    seed: int = 0
    """Determines prompt order, sampling and random selection; the same seed gives the same run."""
