"""One process at a time has a run; an attempt that trained no step makes room for the next one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from opsd.utils.errors import UserError

# What a run writes into its folder. config.json last: without it the rest would be files of no run.
_WRITTEN = ("metrics.jsonl", "rollouts", "tokens", "eval", "checkpoints", "wandb", "tensorboard", "config.json")
# What the system says of a file system that knows no locks: there nobody can tell who has a run.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF}


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Within it this process has the run, and no other one can. Raises UserError where another one has it."""
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
    """Move what an attempt has written into the first attempt_N of the run's folder that is free; returns that."""
    aside = next(place for n in itertools.count(1) if not (place := path / f"attempt_{n}").exists())
    with alone(path):
        aside.mkdir()
        for name in _WRITTEN:
            if (path / name).exists():
                (path / name).rename(aside / name)
    return aside
