"""The list of a checkpoint's files with their sizes and CRC-32s, written last and checked before anything is read.

    manifest.json   {"format": 1, "world_size": n, "files": {path: {"bytes": b, "crc32": "hex", "rank": r}}}

`path` is relative to the checkpoint's directory, `rank` the one that wrote the file. The manifest itself is not listed.
"""

import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from src.checkpoints.durable import checksum
from src.checkpoints.source import raise_listed
from src.errors import UserError, counted

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 1
# zlib.crc32 runs at 1 to 5 GB/s a core and without the interpreter's lock; with 4 files at a time disks are slower.
THREADS = 4
# Seconds before a progress bar is worth showing.
PATIENCE = 3.0


@dataclass(frozen=True)
class FileRecord:
    """One file as it was written: its size, the CRC-32 of its bytes in hexadecimal, the rank that wrote it."""

    bytes: int
    crc32: str
    rank: int


def dump_manifest(files: dict[str, FileRecord], world_size: int) -> str:
    """The text of manifest.json."""
    listed = {name: asdict(files[name]) for name in sorted(files)}
    return json.dumps({"format": FORMAT, "world_size": world_size, "files": listed}, indent=1)


def read_manifest(directory: Path) -> dict[str, FileRecord] | None:
    """The files that belong to a checkpoint; None where it has no manifest (written before there were any).

    Raises:
        ValueError: the manifest cannot be read, or is of a later format.
    """
    file = directory / MANIFEST
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text())
        if content["format"] > FORMAT:
            raise UserError(f"{file} has format {content['format']}, this version reads up to {FORMAT}; update it")
        return {name: FileRecord(**record) for name, record in content["files"].items()}
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{file} is torn: {error}") from error


def check_manifest(directory: str | Path, *, checksums: bool = True, rank: int = 0, world_size: int = 1) -> None:
    """Checks a checkpoint's files against its manifest.

    Each rank checks the files that it wrote, of a larger world also those of rank + world_size and so on: nothing is
    read twice over, and on the same layout a rank then finds its own file in the page cache. With `world_size` above 1
    and a process group the call is collective: every rank raises the list of all. A checkpoint without a manifest is
    accepted with a warning.

    Args:
        checksums: also read the files; without, presence and size are all that is compared.

    Raises:
        ValueError: all files that are missing, of another size or of other content, and which checkpoint to use.
    """
    path = Path(directory)
    try:
        files = read_manifest(path)
        problems = [] if files is None else _problems(path, files, checksums, rank, world_size)
    except (ValueError, OSError) as error:  # a torn manifest or one that is not to be read: every rank must know
        files, problems = {}, [str(error)]
    if files is None and rank == 0:
        log.warning("%s has no %s: its files are taken as they are", path, MANIFEST)
    if world_size > 1 and dist.is_initialized():
        found: list[list[str]] = [[] for _ in range(world_size)]
        dist.all_gather_object(found, problems)
        problems = sorted({problem for part in found for problem in part})
    if problems:
        raise_listed(f"{path}: {counted(len(problems), 'bad file')}; {_remedy(path)}", problems)


def _problems(directory: Path, files: dict[str, FileRecord], checksums: bool, rank: int, world_size: int) -> list[str]:
    """What is wrong with this rank's share of the files."""
    share = {name: record for name, record in files.items() if record.rank % world_size == rank}
    total = sum(record.bytes for record in share.values()) if checksums else 0
    with (
        ThreadPoolExecutor(THREADS) as pool,
        tqdm(total=total, unit="B", unit_scale=True, desc="Checking files", delay=PATIENCE, disable=rank != 0) as bar,
    ):

        def wrong(name: str) -> str | None:
            try:
                found = _difference(directory / name, share[name], bar.update if checksums else None)
            except OSError as error:
                found = f"cannot be read, {error}"
            return None if found is None else f"{name}: {found}"

        return [problem for problem in pool.map(wrong, share) if problem]


def _difference(file: Path, record: FileRecord, read: Callable[[int], object] | None) -> str | None:
    """How a file differs from its record; its content is read if `read` is to be told how many bytes were."""
    if not file.is_file():
        return "missing"
    if file.stat().st_size != record.bytes:
        return f"torn, {file.stat().st_size} of {record.bytes} bytes"
    if read is not None:
        with open(file, "rb") as content:
            crc32 = checksum(content, read)
        if crc32 != record.crc32:
            return f"its content changed, CRC-32 {crc32} instead of {record.crc32}"
    return None


def _remedy(directory: Path) -> str:
    """Names the newest other checkpoint beside `directory` that has all its files in their sizes."""
    here = directory.resolve()
    others = [file for file in here.parent.glob(f"*.ckpt/{MANIFEST}") if file.parent.resolve() != here]
    for file in sorted(others, key=lambda f: f.stat().st_mtime, reverse=True):
        if _is_whole(file.parent):
            return f"move it away and use the newest whole one beside it, --ckpt_path {file.parent.resolve()}:"
    return f"no other checkpoint in {here.parent} is whole, so use a copy from elsewhere:"


def _is_whole(directory: Path) -> bool:
    try:
        files = read_manifest(directory)
    except ValueError:
        return False
    return files is not None and not any(_difference(directory / name, files[name], None) for name in files)
