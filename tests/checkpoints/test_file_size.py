"""Sizes of files as a user writes them."""

import pytest

from src.weights.file_size import parse_size


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5 gb", 1_500_000_000), ("4GiB", 2**32), ("77", 77)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5 PB", "five"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"max_shard_size '{text}' is not a size; write it as 5GB"):
        parse_size(text)
