"""Hostile texts: code in many costumes, numbers and brackets that break parsers, characters that break encoders.

Whatever of it ran would touch `MARKER`.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

MARKER = Path(tempfile.gettempdir()) / f"opsd-hostile-{os.getpid()}"
TOUCH = f"touch {MARKER}"
CALL = f"__import__('os').system('{TOUCH}')"
# The protocol that needs no bytes beyond ASCII.
PICKLE = f"cposix\nsystem\n(S'{TOUCH}'\ntR."

CODE = [
    CALL,
    f"eval({CALL!r})",
    f"exec({CALL!r})",
    f"sympify({CALL!r})",
    f"lambdify((), {CALL!r})()",
    f"(lambda: {CALL})()",
    f"[c for c in ().__class__.__base__.__subclasses__()][0]; {CALL}",
    f"{{{CALL}}}",
    f"f'{{{CALL}}}'",
    "{0.__class__.__init__.__globals__}",
    "%(x)s%n%s",
    f"${{{TOUCH}}}",
    f"$({TOUCH})",
    f"`{TOUCH}`",
    f"; {TOUCH} #",
    f"| {TOUCH}",
    f"\n{TOUCH}\n",
    f"{{{{ cycler.__init__.__globals__.os.system('{TOUCH}') }}}}",
    f"{{% set x = cycler.__init__.__globals__.os.system('{TOUCH}') %}}",
    f"!!python/object/apply:os.system ['{TOUCH}']",
    f"\\write18{{{TOUCH}}}",
    f"\\immediate\\write18{{{TOUCH}}}",
    f"\\input{{|{TOUCH}}}",
    f"\\directlua{{os.execute('{TOUCH}')}}",
    f"\\text{{{CALL}}}",
    f"\\operatorname{{{CALL}}}(1)",
    f"\\mathrm{{{CALL}}} + 1",
    f"\\frac{{{CALL}}}{{1}}",
    f"1 + {CALL}",
    f"1**{CALL}",
    f"x_{{{CALL}}} = 1",
    f"$ {CALL} $",
    PICKLE,
    base64.b64encode(PICKLE.encode()).decode(),
    f"data:application/octet-stream;base64,{base64.b64encode(PICKLE.encode()).decode()}",
    "../../../../etc/passwd",
    "file:///etc/passwd",
    "\\input{/etc/passwd}",
    "__class__",
    "__init__.__globals__",
    "<script>document.title='owned'</script>",
]
NUMBERS = [
    *("1e999", "-1e999", "NaN", "Infinity", "-0", "1_000", "0x41", "½", "²", "٣", "१२", "１２", "1/0", "0/0", "9e9"),
    *("9" * 20, "9" * 400, "9" * 5000, "1" * 100_000, "0." + "3" * 50_000, "9**9", "1,000,000,00"),
]
# These keep sympy busy until its time is up.
POWERS = ["9^{9^{9^{9}}}", "9**9**9**9", "(10^{10^{10}})!"]
CHARACTERS = [
    *("\ud800", "\udfff\ud800", "\x00", "\x1b[2J\x1b]0;owned\x07", "\u202e", "\u2066", "\u2028", "\x85", "\ufeff"),
    *("\r", "\x0b", "e\u0301" * 50, "\U0001f71a", "\uffff", "∎turn∎", "<|im_end|>", "<eos>", "</tool_response>"),
]
DEEP = [
    *("[" * 10_000 + "]" * 10_000, "(" * 10_000 + "1" + ")" * 10_000, "{" * 10_000 + "}" * 10_000),
    *('{"a":' * 10_000 + "1" + "}" * 10_000, "[" * 500 + "]" * 500, "\\frac{1}{" * 500 + "1" + "}" * 500),
    *("\\left(" * 1000, "<tool_call>" * 10_000, "<plan>" * 10_000, "<think>" * 10_000),
]
LONG = ["x" * 1_000_000, "1+" * 500_000, "\ud800" * 200_000, "¥" * 150_000, "|" * 150_000]
CORPUS = [*CODE, *NUMBERS, *CHARACTERS, *DEEP, *LONG]


def calls(text: str) -> list[str]:
    """`text` as the name, the arguments, one argument and a key of a tool call, and as the body of one."""
    quoted = json.dumps(text)
    made = [
        f'{{"name": {quoted}, "arguments": {{}}}}',
        f'{{"name": "search_location", "arguments": {quoted}}}',
        f'{{"name": "search_location", "arguments": {{"place_name": {quoted}}}}}',
        f'{{"name": "query_restaurant_details", "arguments": {{{quoted}: 1, "restaurant_name": {quoted}}}}}',
        f'{{"name": "search_location", "arguments": {{"place_name": {text}}}}}',
        text,
    ]
    return [f"<tool_call>{body}</tool_call>" for body in made]


def plans(text: str) -> list[str]:
    """`text` as a whole answer, as a plan, and in every place of a plan's lines."""
    lines = [
        text,
        f"Day {text}:",
        f"Current City: {text}",
        f"Accommodation: {text}, ¥{text}/room/night",
        f"09:00-10:00 | travel_intercity_public | train {text}, {text} - {text}, ¥{text}/person",
        f"09:00-10:00 | travel_city | {text} - {text}, {text}km, {text}min, ¥{text}",
        f"09:00-10:00 | meal | Lunch, {text}, ¥{text}/person",
        f"09:00-10:00 | attraction | {text}, ¥{text}/person",
        f"{text} | {text} | {text}",
        f"Total Estimated Budget: {text}",
    ]
    return [text, f"<plan>{text}</plan>", *(f"<plan>Day 1:\n{line}\n</plan>" for line in lines)]


# What reading a text has no business with.
_FORBIDDEN = ("open", "os.", "subprocess.", "socket.", "exec", "compile", "import", "pickle.", "ctypes.", "shutil.")
_seen: list[str] | None = None


@lru_cache(maxsize=1)
def _listen() -> None:
    """Add the hook; Python knows no way to take one out again."""

    def hook(event: str, args: tuple[object, ...]) -> None:
        if _seen is not None and event.startswith(_FORBIDDEN):
            _seen.append(f"{event} {args[:1]!r:.80}")

    sys.addaudithook(hook)


@contextmanager
def watched() -> Iterator[list[str]]:
    """The interpreter's own record (PEP 578) of files, processes, sockets, imports and code, while the block runs."""
    global _seen
    _listen()
    _seen = found = []
    try:
        yield found
    finally:
        _seen = None
