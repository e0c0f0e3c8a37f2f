"""Options of a selector, which arrive as Python values or, from the command line, as text."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from opsd.utils.errors import UserError

TRUE, FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}


def convert_options(owner: Any, label: str) -> None:
    """Turn each field of the dataclass `owner` into its default's type, in place.

    Errors: UserError naming the option, what was received and what to give.
    """
    for field in dataclasses.fields(owner):
        given = getattr(owner, field.name)
        kind = type(field.default)
        try:
            setattr(owner, field.name, _convert(given, kind))
        except (TypeError, ValueError):
            raise UserError(f"{label}: {field.name} {given!r}: give {_expected(kind)}") from None


def check_range(label: str, name: str, value: float, low: float, high: float, *, open_low: bool = True) -> None:
    """Raises UserError unless low < value ≤ high (low ≤ value if `open_low` is False)."""
    inside = (low < value if open_low else low <= value) and value <= high
    if not inside:
        bracket, end = "(" if open_low else "[", ")" if math.isinf(high) else "]"
        raise UserError(f"{label}: {name} {value}: give a number in {bracket}{low:g}, {high:g}{end}")


def check_choice(label: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises UserError unless value is one of choices."""
    if value not in choices:
        raise UserError(f"{label}: {name} {value!r}: give one of {', '.join(choices)}")


def _convert(given: Any, kind: type) -> Any:
    if kind is bool:
        text = str(given).strip().lower()
        if text in TRUE | FALSE:
            return text in TRUE
        raise ValueError
    if kind is str:
        if not isinstance(given, str):
            raise TypeError
        return given
    if isinstance(given, bool):
        raise TypeError
    number = float(given)
    if not math.isfinite(number) or (kind is int and number != int(number)):
        raise ValueError
    return kind(number)


def _expected(kind: type) -> str:
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
