"""Errors that the user can put right: `src/cli.py` prints them as one line, without a traceback."""


class UserError(ValueError):
    """A value, file or directory of the user's that cannot be used: which, why, and the remedy."""
