"""Files of a run: written completely or not at all, on the disk when a call returns, and verified by checksums.

xxh3_128 finds damage (a flipped bit, a truncated file), not forgery. It is several times as fast as sha256
(docs/reliability.md), which matters for the 50 GB of a 4-billion-parameter student and its AdamW state.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash
from safetensors import SafetensorError

from opsd.utils.errors import RunStopped, first_line

_KIND = "xxh3_128"
_THREADS = 8


@contextlib.contextmanager
def writing(
    what: Path | str, then: str = "fix that, then continue with --resume", raises: type[Exception] = RunStopped
) -> Iterator[None]:
    """If the body cannot write, raises `raises` with one line: `what` cannot be written, why, and what to do `then`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise raises(f"{what} cannot be written ({_cause(error)}); {then}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write to; it then replaces `path` atomically: a killed process leaves the old or new file."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        yield temporary
        to_disk(temporary)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def replace(path: Path, text: str) -> None:
    """Replace a text file atomically; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append(path: Path, text: str) -> None:
    """Append to a file; the text is on the disk when this returns."""
    with path.open("a", encoding="utf-8") as lines:
        lines.write(text)
        lines.flush()
        os.fsync(lines.fileno())


def to_disk(path: Path) -> None:
    """Flush a file's or folder's content to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_checksums(folder: Path, file: Path) -> None:
    """Write the checksums of all files below `folder` into `file`."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path != file)
    file.write_text(json.dumps({"kind": _KIND, "files": _of_files(folder, names)}, indent=1) + "\n")


def damage(folder: Path, file: Path) -> str | None:
    """What is wrong with `folder` by the checksums in `file`, in a few words; None if it is intact.

    Reads every file once. Additional files are not damage.
    """
    try:
        stored = json.loads(file.read_text())
        kind, known = stored["kind"], dict(stored["files"])
    except OSError as error:
        return f"{file.relative_to(folder)}: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return f"{file.relative_to(folder)} is not a list of checksums"
    if kind != _KIND:
        return f"{file.relative_to(folder)} holds {kind} checksums, this version reads {_KIND}"
    missing = [name for name in known if not (folder / name).is_file()]
    if missing:
        return f"{missing[0]} is missing"
    try:
        found = _of_files(folder, list(known))
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    wrong = [name for name in known if found[name] != known[name]]
    return f"{wrong[0]} does not match its checksum" if wrong else None


def checksums_of(folder: Path, only: str = "", but: str | None = None) -> dict[str, str]:
    """The checksums of all files below `folder`, by relative name; hidden files and folders are left out.

    only: take only names with this ending. but: leave out names with this ending.
    """
    files = [path.relative_to(folder) for path in folder.rglob(f"*{only}") if path.is_file()]
    names = sorted(str(file) for file in files if not any(part.startswith(".") for part in file.parts))
    return _of_files(folder, [name for name in names if but is None or not name.endswith(but)])


def _of_files(folder: Path, names: list[str]) -> dict[str, str]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _of_file(folder / name), names), strict=True))


def _of_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()


def _cause(error: Exception) -> str:
    """The cause in a few words. safetensors passes the system's error on as text."""
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    if number := re.search(r"\(os error (\d+)\)", str(error)):
        return os.strerror(int(number[1]))
    return first_line(error)
