"""The one exception that means: the user gave us something we cannot use."""


class UserError(Exception):
    """Bad input. The message is one line: what was received, and what to do.

    The command line prints it on stderr and exits with code 2, without a traceback.
    """
