"""What is the user's to put right, told apart from what is ours: `src/cli.py` prints it as one line, without a
traceback."""


class UserError(ValueError):
    """A value, file or directory of the user's that cannot be worked with: which, why not, and what would do."""


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """1 row, 1,200 rows."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"
