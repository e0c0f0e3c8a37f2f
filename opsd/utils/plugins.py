"""Finds rules by name, and the user's own objects by the path "module:Name", before torch is loaded."""

import contextlib
import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from opsd.utils.errors import UserError, first_line

SELECTOR_GROUP = "opsd.selectors"
ALL_TOKENS = "all"


@cache
def installed(group: str) -> dict[str, EntryPoint]:
    """The entry points of a group by name, sorted by name. Cached, because every installed package is searched."""
    return {point.name: point for point in sorted(entry_points(group=group), key=lambda point: point.name)}


def selector_names() -> list[str]:
    """Names of installed selectors, "all" first."""
    return [ALL_TOKENS, *installed(SELECTOR_GROUP)]


def check_selector_name(name: str) -> None:
    """Raises UserError for a selector that is not installed, or whose module does not exist; does not import it."""
    if name in selector_names():
        return
    if ":" not in name:
        near = difflib.get_close_matches(name, selector_names(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"unknown selector {name!r}: {hint}known: {', '.join(selector_names())}, or 'module:Name'")
    # Of a dotted name only the outermost package: finding the inner ones would import it.
    module = name.partition(":")[0].partition(".")[0]
    with _current_folder():
        if module and module not in sys.modules and importlib.util.find_spec(module) is None:
            raise UserError(f"selector {name!r} cannot be loaded: no module {module!r} here; give 'module:Name'")


def load_path(path: str, what: str, give: str) -> Any:
    """The object that "module:Name" names; modules in the current folder count too. what: the option that named it.

    give: what the message suggests. Raises UserError if it cannot be imported.
    """
    module, _, attribute = path.partition(":")
    if module.endswith(".py"):
        raise UserError(f"{what} {path!r} names a file; give its module: {module.removesuffix('.py')}:{attribute}")
    with _current_folder():
        try:
            found = importlib.import_module(module)
            _check_not_hidden(module, found)
            return getattr(found, attribute)
        except UserError as error:
            raise UserError(f"{what} {path!r}: {error}") from error
        except (Exception, SystemExit) as error:  # a user's module may do anything when it is imported
            said = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"{what} {path!r} cannot be loaded ({said}); give {give}") from error


def _check_not_hidden(module: str, found: Any) -> None:
    """Raises UserError if a file here has the name of an installed module, which was imported instead."""
    here = Path(f"{module}.py")
    if here.is_file() and Path(getattr(found, "__file__", None) or "").resolve() != here.resolve():
        raise UserError(f"{here} of this folder is hidden by the installed module {module!r}; rename the file")


@contextlib.contextmanager
def _current_folder() -> Iterator[None]:
    """Context in which modules of the current folder are found, after all others, so that none replaces a library."""
    sys.path.append(os.getcwd())
    try:
        yield
    finally:
        sys.path.pop()
