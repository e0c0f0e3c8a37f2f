"""Objects of the user's own, by the path "module:Name"."""

import importlib
from typing import Any

from opsd.utils.errors import UserError, first_line


def load_path(path: str, what: str, give: str) -> Any:
    """What a "module:Name" names. what: the option that named it. Raises UserError where it cannot be imported."""
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # a module of the user's own may do anything when it is imported
        said = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{what} {path!r} cannot be loaded ({said}); give {give}") from error
