"""Exceptions that end a command, or a step, early on purpose."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from opsd.utils.streams import outlive_readers


class UserError(Exception):
    """Bad input. The message is one line: what was received, and what to do.

    The command line prints it on stderr and exits with code 2, without a traceback.
    """


class RunStopped(Exception):
    """A run cannot continue (its numbers are not finite, its parts disagree). The message is one line.

    The command line prints it on stderr and exits with code 1; the run can be resumed from its newest checkpoint.
    """


class StepUnusable(RunStopped):
    """A step cannot be trained on: its numbers are not finite, or it has no tokens. The message is one line.

    Every rank raises it. Weights, optimiser and selector are as before the step, so the run can stop or skip the step
    (--optim.on_nonfinite).
    """


def first_line(error: BaseException) -> str:
    """The first line of an exception's message; its type's name if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def exits_on_bad_input(script: str) -> Iterator[None]:
    """For scripts, as for the command line: a UserError ends the process with one line on stderr and exit code 2;
    a closed output pipe is ignored."""
    outlive_readers()
    try:
        yield
    except UserError as error:
        print(f"{script}: {error}", file=sys.stderr)
        sys.exit(2)
