"""Checksums of a folder's files: what was written is what is read again.

xxh3_128 finds damage (a flipped bit, a cut file), not forgery. It is several times as fast as sha256
(docs/reliability.md), which counts with the 50 GB that a 4-billion-parameter student and its AdamW state come to.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

_KIND = "xxh3_128"
_THREADS = 8


def write_checksums(folder: Path, file: Path) -> None:
    """Put the checksums of all files below `folder` into `file`."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path != file)
    file.write_text(json.dumps({"kind": _KIND, "files": _of_files(folder, names)}, indent=1) + "\n")


def damage(folder: Path, file: Path) -> str | None:
    """What is wrong with `folder` by the checksums in `file`, in a few words; None where it is whole.

    Reads every file once. Files that the checksums do not name are no damage.
    """
    try:
        stored = json.loads(file.read_text())
        kind, known = stored["kind"], dict(stored["files"])
    except OSError as error:
        return f"{file.relative_to(folder)}: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return f"{file.relative_to(folder)} is no list of checksums"
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
    return f"{wrong[0]} is not what was written" if wrong else None


def of_folder(folder: Path, only: str = "", but: str | None = None) -> dict[str, str]:
    """The checksums of all files below `folder`, by relative name; hidden files and folders are left out.

    only, but: endings of the names that are taken alone, and of those that are left out.
    """
    files = [path.relative_to(folder) for path in folder.rglob(f"*{only}") if path.is_file()]
    names = sorted(str(file) for file in files if not any(part.startswith(".") for part in file.parts))
    return _of_files(folder, [name for name in names if but is None or not name.endswith(but)])


def _of_files(folder: Path, names: list[str]) -> dict[str, str]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _of_file(folder / name), names), strict=True))


def _of_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()  # pyright: ignore[reportArgumentType]
