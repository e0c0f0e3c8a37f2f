"""math-verify in a separate process: symbolic work that hangs or dies costs one answer, not the run."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
from pathlib import Path

TIMEOUT_SECONDS = 10.0
_START_SECONDS = 60.0
MAX_ANSWER_CHARACTERS = 2000
# With these limits a question fits into the pipe even if each character is escaped as six: writing never blocks.
MAX_GOLD_CHARACTERS = 8000


class MathVerifyProcess:
    """math-verify behind a pipe: JSON lines in and out, one question at a time, each with a time limit."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def equal(self, answer: str, gold: str, boxed: bool = True) -> bool:
        """Whether both parse to equal values; False on a time-out or if the process dies twice.

        boxed: `answer` is a bare answer; otherwise a text that contains one. Both in LaTeX (see answer_text).
        """
        if len(answer) > MAX_ANSWER_CHARACTERS or len(gold) > MAX_GOLD_CHARACTERS:
            return False
        question = json.dumps({"answer": answer, "gold": gold, "boxed": boxed})
        with self._lock:
            # The process may have died before this question, so ask again; if it dies twice, the answer is wrong.
            verdict = self._ask(question)
            return bool(self._ask(question) if verdict is None else verdict)

    def _ask(self, question: str) -> bool | None:
        """The process's verdict, False after TIMEOUT_SECONDS; None if it died."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        process = self._process
        assert process is not None and process.stdin is not None
        try:
            process.stdin.write(question + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            self.stop()
            return None
        reply = self._read_line(TIMEOUT_SECONDS)
        if not reply:
            self.stop()
            return False if reply is None else None
        return json.loads(reply)["equal"]

    def _start(self) -> None:
        # Started by its path, but without its folder on the module search path (-P); works from any directory.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("grading_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        if not self._read_line(_START_SECONDS):
            self.stop()
            raise RuntimeError("the grading process did not start; is math-verify installed?")

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
            self._process = None

    def _read_line(self, seconds: float) -> str | None:
        """The next line; "" if the process has ended, None after `seconds`."""
        assert self._process is not None and self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                return None
        return self._process.stdout.readline()


WORKER = MathVerifyProcess()
atexit.register(WORKER.stop)
# A forked child must not use its parent's pipes.
os.register_at_fork(after_in_child=WORKER.__init__)
