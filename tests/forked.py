"""Python commands in forks of one process that has imported what they need: ready in 0.1 s, not after 5 s.

For claims about what a command does: a fork is a process like any other, with arguments, environment, exit code and
signals of its own. What a start does, an import included, is for tests that start Python.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
IMPORTED = (
    "opsd.__main__",
    "opsd.train",
    "opsd.eval.command",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3",
)
# What a limit of a resource is: soft and hard.
Limits = Mapping[int, tuple[int, int]]


class Command:
    """A command that runs; what it says goes to files."""

    def __init__(
        self, words: Sequence[str | Path], cwd: Path, env: Mapping[str, str], said: str, limits: Limits
    ) -> None:
        self.args, self._said = list(map(str, words)), said
        # A daemon: it is not waited for where a test fails and leaves it.
        job = (self.args, str(cwd), dict(env), said, dict(limits))
        self._process = server().Process(target=_live, args=job, daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float = 900.0) -> int:
        """The exit code. Raises TimeoutExpired, with the command killed, where it takes longer."""
        self._process.join(timeout)
        if (code := self._process.exitcode) is None:
            self._process.kill()
            raise subprocess.TimeoutExpired(self.args, timeout)
        return code

    def kill(self) -> None:
        """End it at once, and wait for that."""
        self._process.kill()
        self._process.join()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def said(self, stream: str) -> str:
        """What it has said so far on "stdout" or "stderr"."""
        file = Path(self._said, stream)
        return file.read_text() if file.exists() else ""


def begin(
    *words: str | Path,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    limits: Limits | None = None,
) -> Command:
    """`python WORDS` in the background. words: -m MODULE, -c CODE or a file, then arguments."""
    said = tempfile.mkdtemp(prefix="said-", dir=_folder().name)
    return Command(words, cwd, os.environ if env is None else env, said, limits or {})


def python(*words: str | Path, **how: Any) -> subprocess.CompletedProcess[str]:
    """`python WORDS`, waited for; what it said. how: as for `begin`."""
    command = begin(*words, **how)
    code = command.wait()
    return subprocess.CompletedProcess(command.args, code, command.said("stdout"), command.said("stderr"))


@cache
def server() -> ForkServerContext:
    """The process that forks; it starts with the first command and ends with this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    return context


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="forked-")


def _live(words: list[str], cwd: str, env: dict[str, str], said: str, limits: dict[int, tuple[int, int]]) -> None:
    """The fork: becomes `python WORDS`. It ends here, with none of what its parent would do at its own end."""
    # It may have children.
    multiprocessing.current_process().daemon = False
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(Path(said, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    for kind, limit in limits.items():
        resource.setrlimit(kind, limit)
    code = 1
    try:
        _run(words)
        code = 0
    except SystemExit as end:
        code = _code_of(end)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _code_of(end: SystemExit) -> int:
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    print(end.code, file=sys.stderr)
    return 1


def _run(words: list[str]) -> None:
    """What Python does with its command line."""
    kind, *rest = words
    if kind == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.path.insert(0, os.getcwd())
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path.insert(0, str(Path(kind).resolve().parent))
        sys.argv = words
        runpy.run_path(kind, run_name="__main__")
