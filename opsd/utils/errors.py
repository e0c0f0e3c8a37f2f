"""The ways in which a command, or a step, ends early on purpose."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from opsd.utils.streams import outlive_readers


class UserError(Exception):
    """Bad input. The message is one line: what was received, and what to do.

    The command line prints it on stderr and exits with code 2, without a traceback.
    """


class RunStopped(Exception):
    """A run cannot go on (its numbers are not finite, its parts disagree). The message is one line.

    The command line prints it on stderr and exits with code 1; the run folder can be looked at, and resumed from its
    newest checkpoint.
    """


class StepUnusable(RunStopped):
    """A step cannot be trained on: its numbers are not finite, or it has no token. The message is one line.

    Every rank raises it, with the weights, the optimiser and the selector as they were before the step: the run can
    stop, or leave the step out (--optim.on_nonfinite).
    """


def first_line(error: BaseException) -> str:
    """The first line of an exception's message; its type's name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def exits_on_bad_input(script: str) -> Iterator[None]:
    """A script as the command line does it: a UserError within ends the process with one line on stderr, exit code 2;
    whoever reads its output may leave."""
    outlive_readers()
    try:
        yield
    except UserError as error:
        print(f"{script}: {error}", file=sys.stderr)
        sys.exit(2)
