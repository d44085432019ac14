"""File sizes as users write them."""

import re

from src.errors import UserError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB" (powers of 10, as transformers reads them) or "4GiB" (powers of 2)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), flags=re.IGNORECASE)
    size = 0
    if match:
        unit = _UNITS[match[2].upper()]
        size = int(float(match[1]) * (2 ** (10 * list(_UNITS.values()).index(unit)) if match[3] else unit))
    if size <= 0:
        raise UserError(f"max_shard_size {text!r} is not a size; write it as 5GB or 500MB")
    return size
