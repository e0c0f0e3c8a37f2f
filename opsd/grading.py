"""Is the answer right? Math answers by math-verify; simple formats by their ending; or a function of your own."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import re
import selectors
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Protocol

from opsd.errors import UserError

TIMEOUT_SECONDS = 10.0
_START_SECONDS = 60.0
_MAX_ANSWER_CHARACTERS = 2000
_TAIL_CHARACTERS = 2000
_MAX_BOXES = 50
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_ANSWER_LINE = re.compile(r"(?im)^[\s*#>]*(?:final\s+)?answer\s*:\s*(.+?)\s*$")
_INTEGER = re.compile(r"[+-]?\d{1,300}", re.ASCII)
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+", re.ASCII)


class Grader(Protocol):
    """Judges responses and names the answer that majority voting counts."""

    def grade(self, response: str, gold: str) -> bool:
        """Whether the response's answer is the gold answer."""
        ...

    def answer(self, response: str, gold: str) -> str | None:
        """The response's answer in a form that equal answers share, or None where there is none."""
        ...


class MathGrader:
    """Mathematical equality of the last boxed or final answer (math-verify)."""

    def grade(self, response: str, gold: str) -> bool:
        """See `grade`."""
        return grade(response, gold)

    def answer(self, response: str, gold: str) -> str | None:
        """The extracted answer's text without blanks."""
        found = extract_answer(response)
        return None if found is None else re.sub(r"\s+", "", found)


class SuffixGrader:
    """A response is right when it ends with the gold answer, e.g. "…;A24"."""

    def grade(self, response: str, gold: str) -> bool:
        """Whether the response ends with `gold`; an empty gold is never matched."""
        return bool(gold) and response.endswith(gold)

    def answer(self, response: str, gold: str) -> str | None:
        """The response's last characters, as many as the gold answer has."""
        return response[-len(gold) :] if gold and len(response) >= len(gold) else None


class FunctionGrader:
    """A user's own function(response, gold) -> bool; it names no answers, so there is no majority vote."""

    def __init__(self, function: Callable[[str, str], bool]) -> None:
        self._function = function

    def grade(self, response: str, gold: str) -> bool:
        """What the function says."""
        return bool(self._function(response, gold))

    def answer(self, response: str, gold: str) -> str | None:
        """None."""
        return None


def load_grader(name: str) -> Grader:
    """ "math", "suffix", or "module:function". Raises UserError for anything else."""
    if name == "math":
        return MathGrader()
    if name == "suffix":
        return SuffixGrader()
    module, _, attribute = name.partition(":")
    try:
        return FunctionGrader(getattr(importlib.import_module(module), attribute))
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--eval.grader {name!r} is unknown ({error}); give math, suffix or module:function") from error


def grade(response: str, gold: str) -> bool:
    """Whether the response's final answer equals `gold` as mathematics.

    The answer is the last balanced \\boxed{…} behind any </think>, else the last "Answer: …" line, else what
    math-verify finds in the last _TAIL_CHARACTERS. Integers compare as integers ("025" is 25). Never raises; an answer that takes math-verify more than TIMEOUT_SECONDS counts as wrong.
    Works in any thread: symbolic work runs in a process of its own, which is restarted when it hangs or dies.
    """
    if not isinstance(response, str) or not isinstance(gold, str):
        return False
    answer = extract_answer(response)
    if answer is None:
        return _WORKER.equal(_behind_thoughts(response)[-_TAIL_CHARACTERS:], gold, boxed=False)
    ours, theirs = _plain(answer), _plain(gold)
    if ours == theirs:
        return bool(ours)
    if _INTEGER.fullmatch(ours) and _INTEGER.fullmatch(theirs):
        return int(ours) == int(theirs)
    return _WORKER.equal(answer, gold)


def extract_answer(response: str) -> str | None:
    """The final answer's text, or None: the last balanced box, else the last "Answer:" line; thoughts do not count."""
    text = _behind_thoughts(response)
    for match in reversed(list(_BOX.finditer(text))[-_MAX_BOXES:]):
        content = _balanced(text, match.end())
        if content is not None:
            return content
    lines = _ANSWER_LINE.findall(text)
    return lines[-1] if lines and len(lines[-1]) <= _MAX_ANSWER_CHARACTERS else None


class _MathVerifyProcess:
    """math-verify behind a pipe: JSON lines in and out, one question at a time, a time limit on each."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def equal(self, answer: str, gold: str, boxed: bool = True) -> bool:
        """Whether both parse to equal values; False on a time-out or where the process dies.

        boxed: `answer` is a bare answer; otherwise it is text to find one in.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            process = self._process
            assert process is not None and process.stdin is not None
            try:
                process.stdin.write(json.dumps({"answer": answer, "gold": gold, "boxed": boxed}) + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                self._stop()
                return False
            reply = self._read_line(TIMEOUT_SECONDS)
            if reply is None:
                self._stop()
                return False
            return json.loads(reply)["equal"]

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "opsd.grading_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        atexit.register(self._stop)
        if self._read_line(_START_SECONDS) is None:
            self._stop()
            raise RuntimeError("the grading process did not start; is math-verify installed?")

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
            self._process = None

    def _read_line(self, seconds: float) -> str | None:
        """The next line, or None when time is up or the process has ended."""
        assert self._process is not None and self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                return None
        return self._process.stdout.readline() or None


_WORKER = _MathVerifyProcess()


def _behind_thoughts(response: str) -> str:
    return response.rsplit("</think>", 1)[-1]


def _balanced(text: str, start: int) -> str | None:
    """Text from `start` to the brace that closes the one before it."""
    depth = 1
    for place in range(start, min(len(text), start + _MAX_ANSWER_CHARACTERS)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return None


def _plain(answer: str) -> str:
    text = answer.strip().strip("$").strip().removesuffix(".")
    return text.replace(",", "") if _THOUSANDS.fullmatch(text) else text
