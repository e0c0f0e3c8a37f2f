"""A run is locked by one process at a time; an attempt that trained no step is moved aside for the next one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from opsd.utils.errors import UserError

# What a run writes into its folder. config.json is moved last, because it marks the folder as a run.
_WRITTEN = ("metrics.jsonl", "rollouts", "tokens", "eval", "checkpoints", "wandb", "tensorboard", "config.json")
# Errors of a file system without locks; there a run cannot be locked.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF}


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Context in which this process holds the run's lock. Raises UserError if another process holds it."""
    folder = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise UserError(f"{path}: another process is training this run; wait for its end, or end it first") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    try:
        yield
    finally:
        os.close(folder)


def put_aside(path: Path) -> Path:
    """Move an attempt's files into the first free attempt_N in the run's folder; returns that folder."""
    aside = next(place for n in itertools.count(1) if not (place := path / f"attempt_{n}").exists())
    with alone(path):
        aside.mkdir()
        for name in _WRITTEN:
            if (path / name).exists():
                (path / name).rename(aside / name)
    return aside
