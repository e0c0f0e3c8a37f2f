"""Advice at the end of an error message: it says how to continue only if something was saved to continue from."""

from __future__ import annotations

_from: str | None = None


def can_go_on(how: str) -> None:
    """From now on the command can be continued, e.g. with "--resume RUN"."""
    global _from
    _from = how


def advice() -> str:
    """What to do after a stop, as the end of a sentence."""
    return "start again, nothing was saved yet" if _from is None else f"continue with {_from}"
