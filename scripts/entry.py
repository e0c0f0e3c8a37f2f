"""How scripts end on bad input."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from opsd.utils.errors import UserError


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Within it, a UserError ends the script: its line on stderr, after the script's name, and exit code 2."""
    try:
        yield
    except UserError as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        sys.exit(2)
