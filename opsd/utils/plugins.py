"""Objects of the user's own, by the path "module:Name"."""

import importlib
import os
import sys
from typing import Any

from opsd.utils.errors import UserError, first_line


def load_path(path: str, what: str, give: str) -> Any:
    """What a "module:Name" names, in the current folder too. what: the option that named it.

    Raises UserError where it cannot be imported.
    """
    module, _, attribute = path.partition(":")
    if module.endswith(".py"):
        raise UserError(f"{what} {path!r} names a file; give its module: {module.removesuffix('.py')}:{attribute}")
    # Last, and for this import alone: a folder named like a library must not stand in for it.
    sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # a module of the user's own may do anything when it is imported
        said = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{what} {path!r} cannot be loaded ({said}); give {give}") from error
    finally:
        sys.path.pop()
