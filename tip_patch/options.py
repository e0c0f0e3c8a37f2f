"""Options of a selector, which arrive as Python values or, from the command line, as text."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from opsd.config.settings import fields_of, wanted
from opsd.utils.errors import UserError

TRUE, FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}


def convert_options(owner: Any, label: str) -> None:
    """Convert each field of the dataclass `owner` to its default's type, in place, and check its type's bounds.

    Errors: UserError naming the option, what was received and what to give.
    """
    bounds = fields_of(type(owner))
    for field in dataclasses.fields(owner):
        given, kind = getattr(owner, field.name), type(field.default)
        try:
            value = _convert(given, kind)
        except (TypeError, ValueError):
            raise UserError(f"{label}: {field.name} {given!r}: give {_expected(kind)}") from None
        if give := wanted(bounds[field.name], value):
            raise UserError(f"{label}: {field.name} {given}: give {give}")
        setattr(owner, field.name, value)


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
