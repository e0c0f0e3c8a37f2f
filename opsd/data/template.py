"""A chat template's text as a function of what is known: a run that goes on another day asks what it asked before."""

from __future__ import annotations

import json
import random
from datetime import datetime
from typing import Any


class Clock:
    """The time that templates see (`strftime_now`), standing still. asked: whether one has looked at it."""

    def __init__(self, time: datetime | None = None) -> None:
        self.time, self.asked = time or datetime.now().replace(microsecond=0), False

    def __call__(self, how: str) -> str:
        """The time in the form of `strftime`."""
        self.asked = True
        return self.time.strftime(how)


def steady(tokenizer: Any, clock: Clock) -> None:
    """From now on the tokenizer's chat template is a function of its messages and settings and of the clock's time.

    Whoever applies it: a template may ask for the time, and its random choices then hang on the messages.
    """
    apply = tokenizer.apply_chat_template

    def apply_steadily(conversation: Any, *rest: Any, **settings: Any) -> Any:
        state = random.getstate()
        random.seed(json.dumps(conversation, default=str))
        try:
            return apply(conversation, *rest, **{"strftime_now": clock, **settings})
        finally:
            random.setstate(state)

    tokenizer.apply_chat_template = apply_steadily
