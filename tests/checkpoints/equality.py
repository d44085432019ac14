"""Where two saved states differ, to the bit."""

from typing import Any

import torch


def differences(a: Any, b: Any, where: str = "state") -> list[str]:
    """Nested containers, tensors bit by bit, other objects by their attributes where they know no equality."""
    if type(a) is not type(b):
        return [f"{where}: {type(a)}, {type(b)}"]
    if isinstance(a, torch.Tensor):
        # Equal bits: a NaN equals itself, -0.0 is not 0.0.
        bits = [t.detach().contiguous().view(-1).view(torch.uint8) for t in (a, b)]
        equal = a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
        return [] if equal else [f"{where}: tensors"]
    if isinstance(a, dict):
        if list(a) != list(b):
            return [f"{where}: keys {list(a)}, {list(b)}"]
        return [found for key in a for found in differences(a[key], b[key], f"{where}[{key!r}]")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [f"{where}: {len(a)}, {len(b)} items"]
        return [f for i, (x, y) in enumerate(zip(a, b, strict=True)) for f in differences(x, y, f"{where}[{i}]")]
    if a == b:
        return []
    return differences(vars(a), vars(b), where) if hasattr(a, "__dict__") else [f"{where}: {a!r}, {b!r}"]
