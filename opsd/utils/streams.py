"""Output whose reader may end before the process does."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import Any

# Errors of a pipe whose reader has ended, as in `| head`, and of a closed terminal.
_NOBODY_READS = (errno.EPIPE, errno.EIO)
_STDERR = 2


class _Outliving(io.FileIO):
    """An output of this process. Once its reader has ended, further output is dropped.

    Lines on stderr for which a disk has no space are dropped too: the run itself may write to another disk. Results on
    stdout are not.
    """

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno == errno.ENOSPC and self.fileno() == _STDERR:
                return len(data)
            if error.errno not in _NOBODY_READS:
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)


def outlive_readers() -> None:
    """From now on the readers of stdout and stderr may end: a run continues, and `--help | head` ends quietly."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        # Not a replacement of it, such as a test's.
        if stream is not None and stream is getattr(sys, f"__{name}__"):
            with contextlib.suppress(OSError):  # its reader may have ended already
                stream.flush()
            raw = io.BufferedWriter(_Outliving(stream.fileno(), "w", closefd=False))
            line_by_line = stream.line_buffering or name == "stderr"
            outliving = io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=line_by_line)
            setattr(sys, name, outliving)
            setattr(sys, f"__{name}__", outliving)
