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


def render_chat(tokenizer: Any, messages: list[dict[str, Any]], clock: Clock, thinking: bool, **settings: Any) -> Any:
    """What the tokenizer's chat template makes of `messages`, up to where the answer begins: text, or token ids.

    A function of its arguments and the clock's time alone: a template's random choices hang on the messages.
    settings: for `apply_chat_template`. Raises whatever a template raises, which is a program.
    """
    state = random.getstate()
    random.seed(json.dumps(messages))
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=thinking, strftime_now=clock, **settings
        )
    finally:
        random.setstate(state)
