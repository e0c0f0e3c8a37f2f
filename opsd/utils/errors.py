"""Exceptions that end a command, or a step, early on purpose, and how those of others become one of them."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from opsd.utils.streams import outlive_readers

# Exceptions that reading damaged or unexpected values raises.
DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError)
# Messages of torch, its allocators and BLAS in a plain RuntimeError, if memory runs out.
_SAYINGS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "cannot allocate memory",
    "bad_alloc",
    "alloc_failed",
    "could not create a memory object",  # oneDNN
)


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means out of memory: torch.OutOfMemoryError, MemoryError, or a known message of torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(saying in text for saying in _SAYINGS)


@contextmanager
def said(what: str, give: str, *kinds: type[BaseException]) -> Iterator[None]:
    """Context in which exceptions of these kinds become UserErrors of one line: what happened, why, and what to give.

    kinds: without any, all but out-of-memory errors. UserErrors and requests to stop the program pass through.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # panics of tokenizers and safetensors are not Exceptions
        if not isinstance(error, kinds) if kinds else is_out_of_memory(error):
            raise
        # A KeyError's text is the key alone.
        why = repr(error) if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"{what} ({why}); {give}") from error


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
