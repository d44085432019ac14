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

from src.disk.durable import checksum
from src.disk.json_file import read_object
from src.errors import UserError
from src.units import counted
from src.weights.source import raise_listed

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 1
# zlib.crc32 runs at 1 to 5 GB/s per core without the interpreter's lock; 4 at a time outrun the disk.
THREADS = 4
# Files up to this size are always checksummed: config.yaml and the like are parsed before the others.
SMALL = 1 << 16
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
    """The files that belong to a checkpoint; None if its manifest is missing or empty.

    Raises:
        ValueError: the manifest cannot be read, or is of a later format.
    """
    file = directory / MANIFEST
    if not file.is_file() or not file.stat().st_size:
        return None
    content = read_object(file, "")
    try:
        if content["format"] > FORMAT:
            raise UserError(f"{file} has format {content['format']}, this version reads up to {FORMAT}; update it")
        files = {name: FileRecord(**record) for name, record in content["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged: {error!r}") from error
    for name, record in files.items():
        if (type(record.bytes), type(record.crc32), type(record.rank)) != (int, str, int) or ".." in Path(name).parts:
            raise UserError(f"{file} is damaged: {name} has {record}")
    return files


def check_manifest(
    directory: str | Path,
    *,
    checksums: bool = True,
    accept_unlisted: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Checks a checkpoint's files against its manifest; call it before any of them is parsed.

    Each rank checks the files that it wrote, and those of rank + world_size and so on of a larger world: no file is
    read twice, and on the same layout a rank's own file is then in the page cache. With `world_size` above 1 and a
    process group the call is collective: every rank raises the list of all.

    Args:
        checksums: also read the files; else files above SMALL are compared by presence and size only.
        accept_unlisted: accept, with a warning, files that the manifest does not list, or all if there is none.

    Raises:
        ValueError: all files that are missing, of another size or of other content, those that the manifest does not
            list, and what to do.
    """
    path, collective = Path(directory), world_size > 1 and dist.is_initialized()
    unlisted: list[str] = []
    try:
        files = read_manifest(path)
        problems = _problems(path, files or {}, checksums, rank, world_size)
        if rank == 0 or not collective:
            unlisted = _unlisted(path, files)
    except (ValueError, OSError) as error:  # a torn or unreadable manifest: every rank must know
        problems = [str(error)]
    if accept_unlisted and unlisted:
        log.warning("%s, taken as it is: %s", path, "; ".join(unlisted))
        unlisted = []
    if collective:
        reports: list[tuple[list[str], list[str]]] = [([], [])] * world_size
        dist.all_gather_object(reports, (problems, unlisted))
        problems = sorted({problem for part, _ in reports for problem in part})
        unlisted = reports[0][1]
    if (problems or unlisted) and not path.is_dir():
        raise UserError(f"there is no checkpoint {path}; give a directory such as runs/NAME/checkpoints/last.ckpt")
    if problems or unlisted:
        trusted = "" if problems else "if you trust it, --accept_unlisted true; else "
        count = counted(len(problems) + len(unlisted), "bad file")
        raise_listed(f"{path}: {count}; {trusted}{_remedy(path)}", [*problems, *unlisted])


def _unlisted(directory: Path, files: dict[str, FileRecord] | None) -> list[str]:
    """Files that the manifest does not list, so that they cannot be checked; hidden files do not count."""
    if files is None:
        return [f"{MANIFEST}: missing or empty, so that no other file can be checked"]
    there = (file.relative_to(directory) for file in sorted(directory.rglob("*")) if not file.is_dir())
    names = [str(name) for name in there if not name.name.startswith(".")]
    return [f"{name}: not listed in {MANIFEST}" for name in names if name not in files and name != MANIFEST]


def _problems(directory: Path, files: dict[str, FileRecord], checksums: bool, rank: int, world_size: int) -> list[str]:
    """The problems of this rank's share of the files."""
    share = {name: record for name, record in files.items() if record.rank % world_size == rank}
    total = sum(record.bytes for record in share.values()) if checksums else 0
    with (
        ThreadPoolExecutor(THREADS) as pool,
        tqdm(
            total=total, unit="B", unit_scale=True, desc="Checking files", delay=PATIENCE, disable=rank != 0 or None
        ) as bar,
    ):

        def wrong(name: str) -> str | None:
            read = bar.update if checksums or share[name].bytes <= SMALL else None
            try:
                difference = _difference(directory / name, share[name], read)
            except OSError as error:
                difference = f"cannot be read, {error}"
            return None if difference is None else f"{name}: {difference}"

        return [problem for problem in pool.map(wrong, share) if problem]


def _difference(file: Path, record: FileRecord, read: Callable[[int], object] | None) -> str | None:
    """How a file differs from its record; with `read`, called with the bytes read, its content is compared too."""
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
    """Names the newest other checkpoint next to `directory` whose files all have their sizes."""
    here = directory.resolve()
    others = [file for file in here.parent.glob(f"*.ckpt/{MANIFEST}") if file.parent.resolve() != here]
    for file in sorted(others, key=lambda f: f.stat().st_mtime, reverse=True):
        if _is_whole(file.parent):
            return f"move it away and use the newest whole one beside it, --ckpt_path {file.parent.resolve()}:"
    return f"no other checkpoint in {here.parent} is whole, so use a copy from elsewhere:"


def _is_whole(directory: Path) -> bool:
    try:
        files = read_manifest(directory)
        return files is not None and not (
            _unlisted(directory, files)
            or any(_difference(directory / name, record, None) for name, record in files.items())
        )
    except (ValueError, OSError):
        return False
