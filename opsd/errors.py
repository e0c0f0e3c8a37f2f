"""The two ways in which a command ends early on purpose."""


class UserError(Exception):
    """Bad input. The message is one line: what was received, and what to do.

    The command line prints it on stderr and exits with code 2, without a traceback.
    """


class RunStopped(Exception):
    """A run cannot go on (its numbers are no numbers, its parts disagree). The message is one line.

    The command line prints it on stderr and exits with code 1; the run folder can be looked at, and resumed from its
    newest checkpoint.
    """
