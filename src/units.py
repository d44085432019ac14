"""Units and counts, as they are printed."""

GIB = 2**30  # bytes


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """1 row, 1,200 rows."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"
