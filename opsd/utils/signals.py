"""SIGTERM, Ctrl-C, a closed terminal: the first signal asks a run to save and stop, a second one ends it at once.

A thread receives signals through Python's wake-up descriptor: a process that waits in a collective runs no Python
handler, but a second signal must still end it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from opsd.utils.going_on import advice

# Launchers send two signals in a row (deepspeed's within 0.1 s), and Ctrl-C reaches a process both from the terminal
# and from its launcher: only a signal after this time is a second request.
REPEAT_S = 1.0


def to_hear() -> list[signal.Signals]:
    """The signals that ask to stop. Under nohup, SIGHUP (a closed terminal) is ignored and not among them."""
    hangs_up = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGTERM, signal.SIGINT, *hangs_up]


def interrupted() -> str:
    """The message for a signal outside `heeded`."""
    return f"interrupted; {advice()}"


class Interrupted(KeyboardInterrupt):
    """A signal ends this process; the message is one line. orderly: all ranks agreed to stop, at the same place."""

    def __init__(self, number: int, message: str, orderly: bool = False) -> None:
        super().__init__(message)
        self.exit_code, self.orderly = 128 + number, orderly


class _Listener:
    """Receives signals. heeding: the run checks `asked` itself, so the first signal raises nothing."""

    def __init__(self) -> None:
        self.heeding, self.asked, self._first_s = False, 0, 0.0
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)

    def open(self) -> None:
        """Start listening."""
        self._old_descriptor = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._old_handlers = {number: signal.signal(number, self._handle) for number in to_hear()}
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def close(self) -> None:
        """Stop listening, and restore the handlers."""
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_descriptor)
        os.close(self._write)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Runs in the main thread. If the run does not check `asked`, the signal raises."""
        if not self.heeding:
            raise Interrupted(number, interrupted())

    def _listen(self) -> None:
        while heard := os.read(self._read, 1):
            if heard[0] in self._old_handlers:
                self._hear(heard[0])
        os.close(self._read)

    def _hear(self, number: int) -> None:
        name = signal.Signals(number).name
        if not self.asked:
            self.asked, self._first_s = number, time.monotonic()
            if self.heeding:
                _say(f"{name}: saving and stopping after this stage of the step; a second signal ends the run at once")
        elif time.monotonic() - self._first_s >= REPEAT_S:
            _say(f"{name}, the second signal: ended at once; {advice()}")
            os._exit(128 + number)


_listener: _Listener | None = None


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Context in which the signals of `to_hear` raise Interrupted, or are `heeded`; only in the main thread."""
    global _listener
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _listener = listener = _Listener()
    listener.open()
    try:
        yield
    finally:
        listener.close()
        _listener = None


@contextlib.contextmanager
def heeded() -> Iterator[None]:
    """Context in which the first signal only sets `asked`: the caller checks it, saves, and stops."""
    if _listener is None:
        yield
        return
    _listener.heeding = True
    try:
        yield
    finally:
        _listener.heeding = False


def asked() -> int:
    """The signal that asked to stop; 0 if there was none, or outside `heard`."""
    return 0 if _listener is None else _listener.asked


def end(code: int) -> NoReturn:
    """End the process. One of several processes ends at once, because the others might wait for it meanwhile.

    The libraries' clean-up is skipped then: on a busy machine it sometimes aborted a rank whose work was done, and the
    launcher reported the whole run as failed.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _say(line: str) -> None:
    """Print on stderr, on the first rank; not through Python's buffers, which the main thread may have locked."""
    # Ctrl-C may have ended a `| tee`, too.
    with contextlib.suppress(OSError):
        if os.environ.get("RANK", "0") == "0":
            os.write(2, f"opsd: {line}\n".encode())
