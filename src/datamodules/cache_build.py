"""Builds a token cache: its place, its lock, and the tokenising."""

import hashlib
import json
import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path

from datasets import Dataset, Features, List, Value
from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerFast

from src.disk.space import named_if_full
from src.errors import UserError
from src.units import counted

from .files import digest
from .reader import scan
from .row_account import Report
from .tokenization import TokenizeOptions, tokenize_spans

log = logging.getLogger(__name__)

FORMAT_VERSION = 5  # raise it when rendering, masking, the columns or the report change
WRITTEN_AT_ONCE = 64  # samples that a process holds before it writes them
SHARE = 8 << 20  # bytes that a process tokenises in some ten seconds; it takes seconds to start
SKIPPED = "skipped.jsonl"  # the rows that were skipped, with the reasons

BUILDING = ".building-"  # in the name of an incomplete folder
FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "target_spans": List(Value("int32")),  # start, stop, start, stop, ...
        "file": Value("int32"),
        "row": Value("int64"),
        "length": Value("int32"),
        "targets": Value("int32"),
        "mtp_targets": Value("int32"),
        "digest_0": Value("int64"),  # of the tokens and targets of all samples of the row
        "digest_1": Value("int64"),
    }
)


class CacheBuild:
    """The cache of some files, at `directory`, built or not.

    Args:
        paths: data files, which are read for their digests.
        num_proc: processes that tokenise; None: by the size of the files and the CPU cores.
    """

    def __init__(
        self,
        paths: Sequence[str],
        tokenizer: PreTrainedTokenizerFast,
        options: TokenizeOptions,
        cache_dir: Path,
        num_proc: int | None,
    ) -> None:
        self.paths, self.tokenizer, self.options, self.num_proc = paths, tokenizer, options, num_proc
        self._digests = [digest(path) for path in paths]
        self.directory = cache_dir / self._fingerprint()

    def _fingerprint(self) -> str:
        parts = {
            "version": FORMAT_VERSION,
            "files": self._digests,
            "tokenizer": self.tokenizer.backend_tokenizer.to_str(),
            "chat_template": self.tokenizer.chat_template,
            "special_tokens": {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()},
            "options": asdict(self.options),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    @contextmanager
    def lock(self, directory: Path | None = None, timeout: float = -1) -> Iterator[None]:
        """The lock of the process that builds this cache (or the one at `directory`), or removes its leftovers.

        Raises:
            ValueError: the folder cannot be written to.
            Timeout: another process has held it for `timeout` seconds.
        """
        directory = directory or self.directory
        where = directory.parent
        try:
            where.mkdir(parents=True, exist_ok=True)
            # Whoever may write to the folder may take its locks, whatever umask made them.
            lock = FileLock(f"{directory}.lock", timeout, mode=where.stat().st_mode & 0o666)
            lock.acquire()
        except Timeout:
            raise
        except OSError as error:
            raise UserError(f"{where} cannot be written to ({error}); give another --data.cache_dir") from None
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def aside(self) -> Iterator[Path]:
        """A new folder to build in, removed at the end; under the lock."""
        self._remove_abandoned()
        name = f"{self.directory.name}{BUILDING}{socket.gethostname()}-{uuid.uuid4().hex}"
        building = self.directory.with_name(name)
        building.mkdir()
        try:
            with named_if_full(self.directory, "data.cache_dir"):
                yield building
        finally:
            shutil.rmtree(building, ignore_errors=True)

    def _remove_abandoned(self, older_than: float = 86400.0) -> None:
        """Removes what killed builds left of this cache and of others that nobody builds now. Leftovers of other
        machines must also be `older_than` seconds old, since on some disks a lock does not reach other machines."""
        for left in self.directory.parent.glob(f"*{BUILDING}*"):
            name, _, rest = left.name.partition(BUILDING)
            with suppress(Timeout, FileNotFoundError):
                if rest.startswith(f"{socket.gethostname()}-") or time.time() - left.stat().st_mtime > older_than:
                    other = left.with_name(name)
                    with nullcontext() if other == self.directory else self.lock(other, timeout=0):
                        shutil.rmtree(left, ignore_errors=True)

    def publish(self, building: Path) -> None:
        """Gives a built folder its name.

        Raises:
            ValueError: a file has changed since the build began.
        """
        for path, before in zip(self.paths, self._digests, strict=True):
            if digest(path) != before:
                raise UserError(f"{path} changed while it was read; start again when it is written")
        try:
            building.rename(self.directory)
        except OSError:
            if (
                not self.directory.exists()
            ):  # else another node was faster, on a disk whose locks do not reach other nodes
                raise

    def tokenize(self, building: Path, all_errors: bool = False) -> Report:
        """Fills `building` with samples and manifest; with `all_errors` with the sound rows' samples, whatever is wrong
        with the others."""
        scans = [scan(path) for path in self.paths]
        problems = [scan.problem for scan in scans if scan.problem is not None]
        work = [(file, span) for file, scan in enumerate(scans) for span in scan.spans]
        reports, datasets = building / "reports", building / "datasets"
        reports.mkdir()
        datasets.mkdir()
        if work and (all_errors or not problems):
            processes = min(self.num_proc or self._processes(), len(work))
            if self._size > SHARE:
                log.info(
                    "tokenizing %s, %.2f GB, with %s; kept in %s",
                    counted(len(self.paths), "file"),
                    self._size / 1e9,
                    counted(processes, "process", "processes"),
                    self.directory,
                )
            template = self.options.template(self.tokenizer)
            try:
                Dataset.from_generator(
                    tokenize_spans,
                    features=FEATURES,
                    cache_dir=str(datasets),
                    gen_kwargs={
                        "work": [(index, *item) for index, item in enumerate(work)],
                        "template": template,
                        "options": self.options,
                        "reports": reports,
                        "all_errors": all_errors,
                    },
                    num_proc=processes if processes > 1 else None,
                    fingerprint=building.name,
                    writer_batch_size=WRITTEN_AT_ONCE,
                )
            except ValueError:  # datasets knows no empty dataset; the reports say why it is empty
                if _gather(reports).statistics.samples:
                    raise
        report = _gather(reports)
        report.problems[:0] = problems
        for index, file in enumerate(sorted(datasets.rglob("*.arrow"))):
            file.rename(building / f"data-{index:05d}.arrow")
        if report.statistics.skipped:
            with (building / SKIPPED).open("wb") as listed:
                for file in sorted(reports.glob("*.skipped")):
                    listed.write(file.read_bytes())
        shutil.rmtree(datasets)
        shutil.rmtree(reports)
        manifest = {**report.to_json(), "files": list(self.paths), **asdict(self.options)}
        (building / "manifest.json").write_text(json.dumps(manifest, indent=2))
        return report

    def _processes(self) -> int:
        return max(1, min(len(os.sched_getaffinity(0)), self._size // SHARE))

    @property
    def _size(self) -> int:
        return sum(os.path.getsize(path) for path in self.paths)


def _gather(reports: Path) -> Report:
    """Adds up the reports of all spans, in the order of the rows."""
    total = Report()
    for report in sorted(reports.glob("*.json")):
        total.add(Report.from_json(json.loads(report.read_text())))
    total.problems = total.mixed_files()
    return total
