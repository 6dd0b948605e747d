"""The one exception that the user is meant to read."""


class UserError(ValueError):
    """Bad input: the message is one sentence that says what was wrong, where, and what to do.

    The command lines print it without a traceback and exit with code 2.
    """
