"""Tokenise once: samples in a memory-mapped cache, one directory for each (files, tokenizer, options).

A directory appears whole or not at all: it is written aside, under a lock, and renamed. Its name is a digest of the
files' bytes, the tokenizer with its template, the options and the format, so it never goes stale.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from datasets import Dataset, Features, List, Value, concatenate_datasets
from filelock import FileLock
from transformers import PreTrainedTokenizerFast

from .chat_template import ChatTemplate
from .reader import FileScan, Span, scan
from .sequence_shard import Document
from .tokenization import Report, TokenizeOptions, tokenize_spans

FORMAT_VERSION = 2  # raise it when rendering, masking, the columns or the report change
WRITTEN_AT_ONCE = 64  # samples that a process holds before it writes them

_FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "target_spans": List(Value("int32")),  # start, stop, start, stop, ...
        "file": Value("int32"),
        "row": Value("int64"),
        "length": Value("int32"),
        "targets": Value("int32"),
        "mtp_targets": Value("int32"),
    }
)


class TokenCache:
    """The samples of one cache directory, memory-mapped, and the report on their rows.

    `lengths`, `targets`, `mtp_targets`: int32 [samples], tokens and labels of each sample. `files`, `file_rows`: int32
    and int64 [samples], the number of its path and its row there; the samples of a row stand together.
    """

    def __init__(self, directory: Path, paths: Sequence[str]) -> None:
        manifest = json.loads((directory / "manifest.json").read_text())
        self.fingerprint = directory.name
        self.report = Report.from_json(manifest)
        self.statistics = self.report.statistics
        self.paths = list(paths)
        files = sorted(str(path) for path in directory.glob("*.arrow"))
        parts = [Dataset.from_file(file) for file in files] or [
            Dataset.from_dict(dict.fromkeys(_FEATURES, []), _FEATURES)
        ]
        self._table = concatenate_datasets(parts).with_format("arrow")
        assert len(self._table) == self.statistics.samples
        self.lengths, self.targets, self.mtp_targets, self.files, self.file_rows = (
            self._table.data.column(name).to_numpy() for name in ("length", "targets", "mtp_targets", "file", "row")
        )

    def __len__(self) -> int:
        return len(self._table)

    def document(self, index: int) -> Document:
        row = self._table[index]
        return Document(
            row["input_ids"][0].values.to_numpy(),
            row["target_spans"][0].values.to_numpy().reshape(-1, 2),
            self.source(index),
        )

    def source(self, index: int) -> str:
        """The row that a sample comes from, "file:row"."""
        return f"{self.paths[self.files[index]]}:{self.file_rows[index]}"


def default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepseek-sft"


def open_or_build(
    paths: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    options: TokenizeOptions,
    cache_dir: Path | None = None,
    num_proc: int | None = None,
) -> TokenCache:
    """Opens the cache of these files, tokenising them first where it does not exist.

    Safe to call from any number of processes and nodes at once: one tokenises, the others wait for it.

    Args:
        paths: data files (see `reader.expand`).
        num_proc: processes that tokenise; by default as many as the size of the files and the CPU cores suggest.

    Raises:
        RowError: a row is malformed (the first of those found, by file and row).
        ValueError: no sample is left to train on.
    """
    directory, scans = _locate(paths, tokenizer, options, cache_dir)
    if not directory.exists():
        with FileLock(f"{directory}.lock"):
            if not directory.exists():
                _build(directory, scans, tokenizer, options, num_proc or _processes(paths))
    return TokenCache(directory, paths)


@contextmanager
def open_or_check(
    paths: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    options: TokenizeOptions,
    cache_dir: Path | None = None,
    num_proc: int | None = None,
) -> Iterator[TokenCache]:
    """As `open_or_build`, but all that is wrong is in the cache's `report.errors` and nothing is raised.

    Where a row is wrong, or none has anything to train on, the cache holds the sound rows' samples and is gone after
    the `with` block: training never sees it.
    """
    directory, scans = _locate(paths, tokenizer, options, cache_dir)
    with FileLock(f"{directory}.lock"):
        if directory.exists():
            yield TokenCache(directory, paths)
            return
        with _aside(directory) as building:
            report = _tokenize(building, scans, tokenizer, options, num_proc or _processes(paths), all_errors=True)
            sound = not report.errors and report.statistics.samples
            if sound:
                _publish(building, directory)
            yield TokenCache(directory if sound else building, paths)


def _locate(
    paths: Sequence[str], tokenizer: PreTrainedTokenizerFast, options: TokenizeOptions, cache_dir: Path | None
) -> tuple[Path, list[FileScan]]:
    cache_dir = cache_dir or default_cache_dir()
    scans = [remembered_scan(path, cache_dir) for path in paths]
    return cache_dir / _fingerprint(scans, tokenizer, options), scans


def _processes(paths: Sequence[str]) -> int:
    """A process takes seconds to start, as long as a few MB of text take to tokenise."""
    size = sum(os.path.getsize(path) for path in paths)
    return max(1, min(len(os.sched_getaffinity(0)), size // (8 << 20)))


def _fingerprint(scans: Sequence[FileScan], tokenizer: PreTrainedTokenizerFast, options: TokenizeOptions) -> str:
    parts = {
        "version": FORMAT_VERSION,
        "files": [found.digest for found in scans],
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "chat_template": tokenizer.chat_template,
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "options": asdict(options),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def remembered_scan(path: str, cache_dir: Path) -> FileScan:
    """The scan of a file, remembered by its path, size and time, so that only one process has to read it all.

    Raises:
        ValueError: the file cannot be read at all (see `reader.scan`).
    """
    absolute, stat = os.path.abspath(path), os.stat(path)
    name = hashlib.sha256(f"{FORMAT_VERSION} {absolute} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:32]
    memo = cache_dir / "scans" / f"{name}.json"
    try:
        stored = json.loads(memo.read_text())
        return FileScan(path, stored["digest"], tuple(Span(path, *span) for span in stored["spans"]))
    except FileNotFoundError:
        found = scan(path)
    memo.parent.mkdir(parents=True, exist_ok=True)
    spans = [(span.kind, span.first_row, span.start, span.stop) for span in found.spans]
    with tempfile.NamedTemporaryFile("w", dir=memo.parent, delete=False) as file:
        json.dump({"path": absolute, "digest": found.digest, "spans": spans}, file)
    os.replace(file.name, memo)
    return found


def _build(
    directory: Path,
    scans: Sequence[FileScan],
    tokenizer: PreTrainedTokenizerFast,
    options: TokenizeOptions,
    num_proc: int,
) -> None:
    with _aside(directory) as building:
        report = _tokenize(building, scans, tokenizer, options, num_proc)
        for _, examples in report.errors.by_kind():
            raise examples[0]
        if not report.statistics.samples:
            raise ValueError(nothing_to_train_on([found.path for found in scans], report, options))
        _publish(building, directory)


def nothing_to_train_on(paths: Sequence[str], report: Report, options: TokenizeOptions) -> str:
    return (
        f"{', '.join(paths)}: nothing to train on. {'; '.join(report.statistics.lines(options))}. Samples need an "
        "assistant turn without loss: false that begins within max_length"
    )


@contextmanager
def _aside(directory: Path) -> Iterator[Path]:
    """A new folder beside `directory` to build in, removed at the end."""
    _remove_abandoned(directory)
    building = Path(tempfile.mkdtemp(prefix=f"{directory.name}.building-", dir=directory.parent))
    try:
        yield building
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _publish(building: Path, directory: Path) -> None:
    try:
        building.rename(directory)
    except OSError:
        if not directory.exists():  # else another node was faster, where locks do not reach across nodes
            raise


def _tokenize(
    building: Path,
    scans: Sequence[FileScan],
    tokenizer: PreTrainedTokenizerFast,
    options: TokenizeOptions,
    num_proc: int,
    all_errors: bool = False,
) -> Report:
    """Fills `building` with samples and manifest."""
    work = [(file, span) for file, found in enumerate(scans) for span in found.spans]
    reports = building / "reports"
    reports.mkdir()
    processes = min(num_proc, len(work))
    try:
        Dataset.from_generator(
            tokenize_spans,
            features=_FEATURES,
            cache_dir=str(building / "datasets"),
            gen_kwargs={
                "work": [(index, *item) for index, item in enumerate(work)],
                "template": ChatTemplate(tokenizer, options.history_reasoning),
                "options": options,
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
    for index, file in enumerate(sorted((building / "datasets").rglob("*.arrow"))):
        file.rename(building / f"data-{index:05d}.arrow")
    shutil.rmtree(building / "datasets")
    shutil.rmtree(reports)
    manifest = {**report.to_json(), "files": [found.path for found in scans], **asdict(options)}
    (building / "manifest.json").write_text(json.dumps(manifest, indent=2))
    return report


def _gather(reports: Path) -> Report:
    """Adds up the reports of all spans, in the order of the rows."""
    total = Report()
    for report in sorted(reports.iterdir()):
        total.add(Report.from_json(json.loads(report.read_text())))
    return total


def _remove_abandoned(directory: Path, older_than: float = 86400.0) -> None:
    """Removes what killed builds left; by age (seconds), since a lock may not reach another node's build."""
    for left in directory.parent.glob(f"{directory.name}.building-*"):
        if time.time() - left.stat().st_mtime > older_than:
            shutil.rmtree(left, ignore_errors=True)
