"""What all dataclasses of settings share: bounds stand in the types of fields, and are checked when one is made."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeGuard, Union

from opsd.utils.errors import UserError

# Whatever is counted or measured here stays far below; a count beyond it would run for ever.
MOST = 2**31 - 1


@dataclass(frozen=True)
class Bound:
    """What a number may be. holds: false for NaN too. give: what a message asks for."""

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
    """A dataclass of settings. Making one raises UserError for a value outside its field's bounds or choices.

    part: what its flags begin with, e.g. "rollout."; given when a class is declared, without the dot.
    """

    part: ClassVar[str] = ""

    def __init_subclass__(cls, part: str = "") -> None:
        cls.part = f"{part}." if part else ""

    def __post_init__(self) -> None:
        for name, kind in fields_of(type(self)).items():
            value = getattr(self, name)
            if give := _wanted(kind, value):
                raise UserError(f"--{self.part}{name} {value}: give {give}")


@cache
def fields_of(settings: type) -> dict[str, Any]:
    """The fields of a dataclass and their types, with what stands beside these."""
    kinds = typing.get_type_hints(settings, include_extras=True)
    return {field.name: kinds[field.name] for field in dataclasses.fields(settings)}


def is_part(kind: Any) -> TypeGuard[type[Settings]]:
    """Whether a field of this type holds settings of its own."""
    return isinstance(kind, type) and issubclass(kind, Settings)


def _wanted(kind: Any, value: Any) -> str:
    """What to give in place of `value`; nothing where it is within the bounds and choices of its type."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        bounds = [bound for bound in args[1:] if isinstance(bound, Bound)]
        return next((bound.give for bound in bounds if not bound.holds(value)), "")
    if origin is Literal:
        return "" if value in args else f"one of: {', '.join(map(str, args))}"
    if origin in (Union, UnionType):
        # A type with bounds stands first, words such as auto or None behind it.
        words = [word for arg in args[1:] for word in typing.get_args(arg) or (None,)]
        return "" if value in words else _wanted(args[0], value)
    return ""
