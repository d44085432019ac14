"""Tokenise once: samples in a memory-mapped cache, one directory for each (files, tokenizer, options).

A directory is complete or absent: it is written under another name, under a lock, and renamed. Its name is a digest of
the files' bytes (read each time), the tokenizer and its template, the options and the format, so it never goes stale.
"""

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerFast

from src.disk.json_file import read_object
from src.errors import UserError

from .cache_build import BUILDING, FEATURES, SKIPPED, CacheBuild
from .collate import Document
from .files import default_cache_dir
from .row_account import Report
from .tokenization import TokenizeOptions


class TokenCache:
    """The samples of one cache directory, memory-mapped, and the report on their rows.

    `lengths`, `targets`, `mtp_targets`: int32 [samples], tokens and labels of each sample. `files`, `file_rows`: int32
    and int64 [samples], the index of its path and its row there; a row's samples are adjacent.

    Raises:
        ValueError: a file of the cache is missing or damaged.
    """

    def __init__(self, directory: Path, paths: Sequence[str]) -> None:
        try:
            self._open(directory, paths)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, pa.ArrowException) as error:
            raise UserError(
                f"the token cache {directory} is damaged, {error}: remove it to have it built anew"
            ) from error

    def _open(self, directory: Path, paths: Sequence[str]) -> None:
        manifest = read_object(directory / "manifest.json", "")
        self.directory, self.fingerprint = directory, directory.name
        self.report = Report.from_json(manifest)
        self.report.rename_files(dict(zip(manifest["files"], paths, strict=True)))
        self.statistics = self.report.statistics
        self.paths = list(paths)
        files = sorted(str(path) for path in directory.glob("*.arrow"))
        parts = [Dataset.from_file(file) for file in files] or [
            Dataset.from_dict(dict.fromkeys(FEATURES, []), FEATURES)
        ]
        self._table = concatenate_datasets(parts).with_format("arrow")
        if len(self._table) != self.statistics.samples:
            raise ValueError(f"{len(self._table)} samples instead of {self.statistics.samples}")
        self.lengths, self.targets, self.mtp_targets, self.files, self.file_rows = (
            self._column(name) for name in ("length", "targets", "mtp_targets", "file", "row")
        )

    def _column(self, name: str) -> npt.NDArray[Any]:
        column: npt.NDArray[Any] = self._table.data.column(name).to_numpy()
        return column

    def row_digests(self) -> npt.NDArray[np.int64]:
        """A digest of the tokens and targets of each sample's row: int64 [samples, 2]."""
        return np.stack([self._column("digest_0"), self._column("digest_1")], 1)

    def summary(self, options: TokenizeOptions) -> list[str]:
        """Lines for the log: what there is, then what became of rows that do not fit."""
        lines = self.statistics.lines(options.max_length)
        if self.statistics.skipped and BUILDING not in self.fingerprint:
            lines[1] += f", listed in {self.directory / SKIPPED}"
        return lines

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
        """A sample's row, "file:row"."""
        return f"{self.paths[self.files[index]]}:{self.file_rows[index]}"


def open_or_build(
    paths: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    options: TokenizeOptions,
    cache_dir: Path | None = None,
    num_proc: int | None = None,
) -> TokenCache:
    """Opens the cache of these files, after tokenising them if there is none.

    Safe to call from any number of processes and nodes at once: one tokenises, the others wait for it.

    Args:
        paths: data files (see `files.expand`).
        num_proc: processes that tokenise; by default chosen by the files' size and the CPU cores.

    Raises:
        RowError: a row is malformed; the first one found, by file and row.
        ValueError: a file is malformed, or no sample is left to train on.
    """
    build = CacheBuild(paths, tokenizer, options, cache_dir or default_cache_dir(), num_proc)
    if not build.directory.exists():
        with build.lock():
            if not build.directory.exists():
                _build(build)
    return TokenCache(build.directory, paths)


def _build(build: CacheBuild) -> None:
    with build.aside() as building:
        report = build.tokenize(building)
        for problem in report.wrong(build.options.bad_rows == "skip"):
            raise problem
        if not report.statistics.samples:
            raise UserError(nothing_to_train_on(build.paths, report, build.options))
        build.publish(building)


def open_built(fingerprint: str, paths: Sequence[str], cache_dir: Path | None = None) -> TokenCache:
    """Opens a cache that another process has built or opened, without reading the files.

    Raises:
        ValueError: it is not here.
    """
    directory = (cache_dir or default_cache_dir()) / fingerprint
    if not directory.exists():
        raise UserError(
            f"{socket.gethostname()} has no {directory}, the tokens that the first rank trains on: {', '.join(paths)} "
            "must be the same files on every node, or --data.cache_dir a folder that all nodes see"
        )
    return TokenCache(directory, paths)


@contextmanager
def open_or_check(
    paths: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    options: TokenizeOptions,
    cache_dir: Path | None = None,
    num_proc: int | None = None,
) -> Iterator[TokenCache]:
    """As `open_or_build`, but raises nothing: the cache's `report` lists everything wrong.

    If something is wrong, or there is nothing to train on, the cache holds the sound rows' samples and is removed after
    the `with` block, so training never sees it.
    """
    build = CacheBuild(paths, tokenizer, options, cache_dir or default_cache_dir(), num_proc)
    if not build.directory.exists():
        with build.lock():
            if not build.directory.exists():
                with build.aside() as building:
                    report = build.tokenize(building, all_errors=True)
                    if report.wrong(options.bad_rows == "skip") or not report.statistics.samples:
                        yield TokenCache(building, paths)
                        return
                    build.publish(building)
    yield TokenCache(build.directory, paths)


def nothing_to_train_on(paths: Sequence[str], report: Report, options: TokenizeOptions) -> str:
    account = "; ".join(report.statistics.lines(options.max_length))
    return (
        f"{', '.join(paths)}: nothing to train on. {account}. Samples need an assistant turn without loss: false that "
        "begins within max_length"
    )
