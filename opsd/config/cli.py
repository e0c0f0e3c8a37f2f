"""Parses arguments into a frozen dataclass with tyro, and shortens tyro's message boxes to one line."""

from __future__ import annotations

import contextlib
import difflib
import io
import itertools
import re
import typing
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar

import tyro

from opsd.config.other_names import flag_for, unit_for
from opsd.config.settings import Settings, fields_of, is_part, required_of
from opsd.utils.errors import UserError

Config = TypeVar("Config", bound=Settings)
# tyro prints errors in a box on stderr. Its structured errors are in a private module, which its authors call
# unstable; so the box is parsed, and only here.
_TITLE = re.compile(r"╭─[^╮]*╮")
_BOX = re.compile(r"[─-╿]+")
_OPTION = re.compile(r"(--[A-Za-z][\w.]*) ")


def parse(
    config: type[Config], args: list[str], prog: str, bare_switches: bool = False, unset: Config | None = None
) -> Config:
    """`args` as a `config`; `--help` prints all flags and exits. Raises UserError, one line, for bad arguments.

    bare_switches: a bool field is given as --field or --no-field; otherwise it takes a value, --field True.
    unset: values of arguments that are not given, required ones too.
    """
    markers = () if bare_switches else (tyro.conf.FlagConversionOff,)
    default: dict[str, Any] = {} if unset is None else {"default": unset}
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            return tyro.cli(config, prog=prog, args=args, use_underscores=True, config=markers, **default)
        except SystemExit as stop:
            if not stop.code:
                raise
    what = one_line(errors.getvalue(), config, args)
    raise UserError(f"{what}{'' if what.endswith('?') else ';'} `{prog} --help` lists all flags")


def one_line(box: str, config: type[Settings], args: list[str]) -> str:
    """tyro's box about `args` as one line: what is wrong, and the closest known flag."""
    text, flags = " ".join(_BOX.sub(" ", _TITLE.sub(" ", re.sub(r"\x1b\[[\d;]*m", "", box))).split()), flags_of(config)
    text = re.split(r"For full helptext|Argument helptext|Perhaps you meant", text)[0].strip().removesuffix(".")
    unknown = re.search(r"Unrecognized options: ([^\s,]+)", text)
    if unknown:
        if not unknown[1].startswith("-"):
            return f"unexpected argument {unknown[1]}"
        meant = flag_for(unknown[1], list(flags))
        near = [meant] if meant else difflib.get_close_matches(unknown[1], flags, n=1)
        unit = f" {unit_for(unknown[1])}".rstrip() if meant else ""
        return f"unknown option {unknown[1]}" + (f": did you mean {near[0]}{unit}?" if near else "")
    missing = re.search(r"Missing from [^:]+: (.*)", text)
    if missing:
        options = [flag for flag in _OPTION.findall(missing[1]) if flag in flags]
        # For arguments without a flag the box has only types. They are filled in order, so the last ones are missing.
        bare = [name.upper() for name in required_of(config) if f"--{name}" not in options]
        lacking = missing[1].count("(required)") - len(options)
        return f"missing: {', '.join([*bare[len(bare) - lacking :], *options])}"
    wrong = re.search(r"(?:Error parsing |argument '|Missing value for argument ')(--[\w.]+)", text)
    if wrong and wrong[1] in flags and wrong[1] in args:
        rest = args[args.index(wrong[1]) + 1 :]
        given = itertools.takewhile(lambda word: not word.startswith("--"), rest)
        if typing.get_origin(flags[wrong[1]]) not in (tuple, dict):
            given = itertools.islice(given, 1)  # arguments without a flag may follow
        return f"{' '.join([wrong[1], *given])}: give {asked_for(flags[wrong[1]])}"
    return text


def asked_for(kind: Any) -> str:
    """What a flag of this type takes, in words."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return asked_for(args[0])
    if origin is typing.Literal:
        return f"{'one of: ' if len(args) > 1 else ''}{', '.join(map(str, args))}"
    if origin in (typing.Union, UnionType):
        return " or ".join(asked_for(arg) for arg in args)
    words = {int: "a whole number", float: "a number", bool: "True or False", Path: "a path", type(None): "None"}
    return words.get(kind, "KEY VALUE pairs" if origin is dict else "a value")


def flags_of(settings: type[Settings]) -> dict[str, Any]:
    """Every flag of a dataclass of settings with its type; flags of its parts have a dot."""
    found = {}
    for name, kind in fields_of(settings).items():
        part = kind.__origin__ if typing.get_origin(kind) is typing.Annotated else kind
        found |= flags_of(part) if is_part(part) else {f"--{settings.part}{name}": kind}
    # The teacher's model is given as --teacher itself.
    return {flag.removesuffix(".model"): kind for flag, kind in found.items()}
