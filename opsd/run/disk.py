"""Files of a run: whole or not at all, on the disk when a call returns; a disk that fails stops the run in one line."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from opsd.utils.errors import RunStopped


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises RunStopped, which names `path` and the cause, where the body cannot write."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunStopped(f"{path} cannot be written ({_cause(error)}); mend that, then go on with --resume") from error


def replace(path: Path, text: str) -> None:
    """Replace a file as a whole: a kill leaves the old one or the new one."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        temporary.write_text(text)
        to_disk(temporary)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def append(path: Path, text: str) -> None:
    """Add to a file."""
    with path.open("a") as lines:
        lines.write(text)
        lines.flush()
        os.fsync(lines.fileno())


def to_disk(path: Path) -> None:
    """Have a file's or folder's content on the disk, not only on its way."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cause(error: Exception) -> str:
    """In a few words. safetensors hands the system's error on as text."""
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    if number := re.search(r"\(os error (\d+)\)", str(error)):
        return os.strerror(int(number[1]))
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
