"""What is the user's to put right, told apart from what is ours: `src/cli.py` prints it as one line, without a
traceback."""


class UserError(ValueError):
    """A value, file or directory of the user's that cannot be worked with: which, why not, and what would do."""
