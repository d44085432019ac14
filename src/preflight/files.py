"""A run's files as one node sees them: weights, data, and output folders."""

import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from src.datamodules.files import expand

_BLOCK = 16 << 20
_MAX_HEADER = 100_000_000  # the format's own limit


def weights(directory: str, config_only: bool) -> dict[str, str]:
    """File name to size and digest: of a safetensors file's header, which lists every tensor, else of the whole file.

    Raises:
        FileNotFoundError: there is no such directory, or it holds no weights.
    """
    folder, digests = Path(directory), {}
    for file in sorted(folder.glob("*.json") if config_only else folder.iterdir()):
        if file.suffix not in (".json", ".safetensors") or not file.is_file():
            continue
        with open(file, "rb") as content:
            if file.suffix == ".safetensors":
                head = content.read(8)
                head += content.read(min(int.from_bytes(head, "little"), _MAX_HEADER))
            else:
                head = content.read()
        digests[file.name] = f"{file.stat().st_size:,} bytes, {hashlib.sha256(head).hexdigest()[:8]}"
    if "config.json" not in digests or not (config_only or any(name.endswith(".safetensors") for name in digests)):
        raise FileNotFoundError(f"{directory} holds no config.json and weights")
    return digests


def data(patterns: list[str]) -> dict[str, str]:
    """File name to size; reads each file's first byte. Raises ValueError or OSError if it cannot."""
    digests = {}
    for path in expand(patterns):
        with open(path, "rb") as file:
            file.read(1)
        digests[path] = f"{os.path.getsize(path):,} bytes"
    return digests


def free_gb(folder: str) -> float:
    return shutil.disk_usage(folder).free / 1e9


def disk_seconds(folder: str, nbytes: int, barrier: Callable[[], None]) -> tuple[float, float]:
    """Seconds to write and sync a file of `nbytes` bytes, and to read it back without the page cache."""
    probe, block = Path(folder) / f".preflight-{uuid.uuid4().hex}", os.urandom(min(_BLOCK, nbytes))
    descriptor = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        barrier()
        began = time.perf_counter()
        for _ in range(nbytes // len(block)):
            os.write(descriptor, block)
        os.fsync(descriptor)
        wrote = time.perf_counter() - began
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.lseek(descriptor, 0, os.SEEK_SET)
        barrier()
        began = time.perf_counter()
        while os.read(descriptor, len(block)):
            pass
        return wrote, time.perf_counter() - began
    finally:
        os.close(descriptor)
        probe.unlink()
