"""Makes chat templates deterministic: a run that is resumed on another day asks the same prompts as before."""

from __future__ import annotations

import json
import random
from datetime import datetime
from typing import Any


class Clock:
    """The fixed time that templates see (`strftime_now`). asked: whether a template has used it."""

    def __init__(self, time: datetime | None = None) -> None:
        self.time, self.asked = time or datetime.now().replace(microsecond=0), False

    def __call__(self, how: str) -> str:
        """The time, formatted by `strftime`."""
        self.asked = True
        return self.time.strftime(how)


def steady(tokenizer: Any, clock: Clock) -> None:
    """Makes the tokenizer's chat template a function of its messages, its settings and the clock's time alone.

    This holds for every later caller. A template may ask for the time; its random choices are seeded by the messages.
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
