"""Arguments to a frozen dataclass by tyro, and tyro's message boxes to one line."""

from __future__ import annotations

import contextlib
import difflib
import io
import re
import typing
from typing import TypeVar

import tyro

from opsd.config.other_names import flag_for
from opsd.config.settings import Settings, fields_of, is_part
from opsd.utils.errors import UserError

Config = TypeVar("Config", bound=Settings)
# tyro says what is wrong in a box on stderr. Its structured errors are in a private module, which its authors call
# unstable; so the box is read, here alone.
_TITLE = re.compile(r"╭─[^╮]*╮")
_BOX = re.compile(r"[─-╿]+")
_OPTION = re.compile(r"(--[A-Za-z][\w.]*) ")


def parse(config: type[Config], args: list[str], prog: str, bare_switches: bool = False) -> Config:
    """`args` as a `config`; `--help` prints all flags and exits. Raises UserError, one line, for bad arguments.

    bare_switches: a bool field is --field and --no-field; else it takes a value, --field True.
    """
    markers = () if bare_switches else (tyro.conf.FlagConversionOff,)
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            return tyro.cli(config, prog=prog, args=args, use_underscores=True, config=markers)
        except SystemExit as stop:
            if not stop.code:
                raise
    what = one_line(errors.getvalue(), flags_of(config))
    raise UserError(f"{what}{'' if what.endswith('?') else ';'} `{prog} --help` lists all flags")


def one_line(box: str, flags: list[str]) -> str:
    """What tyro says in a box over many lines, as one: what is wrong, and the nearest of the known flags."""
    text = " ".join(_BOX.sub(" ", _TITLE.sub(" ", re.sub(r"\x1b\[[\d;]*m", "", box))).split())
    text = re.split(r"For full helptext|Argument helptext|Perhaps you meant", text)[0].strip().removesuffix(".")
    unknown = re.search(r"Unrecognized options: ([^\s,]+)", text)
    if unknown:
        meant = flag_for(unknown[1], flags)
        near = [meant] if meant else difflib.get_close_matches(unknown[1], flags, n=1)
        return f"unknown option {unknown[1]}" + (f": did you mean {near[0]}?" if near else "")
    missing = re.search(r"Missing from [^:]+: (.*)", text)
    if missing:
        return f"missing: {', '.join(_OPTION.findall(missing[1]))}"
    return text


def flags_of(settings: type[Settings]) -> list[str]:
    """Every flag of a dataclass of settings, those of its parts with a dot."""
    found = []
    for name, kind in fields_of(settings).items():
        kind = kind.__origin__ if typing.get_origin(kind) is typing.Annotated else kind
        found += flags_of(kind) if is_part(kind) else [f"--{settings.part}{name}"]
    # The teacher's model is given as --teacher itself.
    return [flag.removesuffix(".model") for flag in found]
