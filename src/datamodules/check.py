"""`check-data`: everything wrong with a run's data, what it comes to, and what is suspicious, before the run.

It goes through the same reading, rendering, masking and packing as training, and leaves the cache that training opens.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from .cache import TokenCache, default_cache_dir, nothing_to_train_on, open_or_check, remembered_scan
from .findings import Findings
from .reader import RowError, expand
from .sequence_shard import Document
from .sft import PackedSet, SFTDataModule

DIGEST_BYTES = 16

_LEAK = (
    "trains on the same tokens as {}; the validation loss then measures memory: remove the row from one of the files"
)
_COPY = "trains on the same tokens as {}; remove one, unless it is to count twice"


@dataclass
class SetReport:
    """Training's or validation's data."""

    name: Literal["train", "val"]
    problems: list[str] = field(default_factory=list)  # of whole files
    errors: Findings = field(default_factory=Findings)  # of rows
    remarks: Findings = field(default_factory=Findings)
    numbers: list[tuple[str, str]] = field(default_factory=list)  # (what, how much), to be read
    notes: list[str] = field(default_factory=list)  # what became of rows that do not fit
    lengths: list[tuple[int, int, int]] = field(default_factory=list)  # (from, to, samples), both ends included
    shown: list[Document] = field(default_factory=list)

    @property
    def wrong(self) -> int:
        return len(self.problems) + len(self.errors)


def check(data: SFTDataModule, replicas: int | None, accumulation: int, show: int = 0) -> list[SetReport]:
    """Reports on the training and the validation files of a datamodule that has its tokenizer.

    Args:
        replicas: data-parallel size; None where it is not known.
        accumulation: micro-steps of an optimizer step.
        show: conversations of each set to return as training sees them.
    """
    seen: dict[bytes, str] = {}  # digest of a conversation -> the first row of the training data that has it
    train, val = SetReport("train"), SetReport("val")
    with_steps = None if replicas is None else (replicas, accumulation)
    _check_files(train, data, data.train_files, show, seen, with_steps)
    if not data.val_files:
        return [train]
    _check_files(val, data, data.val_files, show, seen, None)
    return [train, val]


def _check_files(
    report: SetReport,
    data: SFTDataModule,
    files: Sequence[str],
    show: int,
    seen: dict[bytes, str],
    with_steps: tuple[int, int] | None,
) -> None:
    assert data.tokenizer is not None
    paths = _readable(files, data, report.problems)
    if not paths:
        return
    with open_or_check(paths, data.tokenizer, data.options, data.cache_dir) as cache:
        report.errors, report.remarks = cache.report.errors, cache.report.remarks
        if not len(cache):
            report.problems.append(nothing_to_train_on(paths, cache.report, data.options))
            return
        copies = leaks = 0
        own = {} if report.name == "val" else seen
        for digest, source in _conversations(cache):
            if report.name == "val" and digest in seen:
                leaks += 1
                report.remarks.add(RowError(source, "", _LEAK.format(seen[digest])))
            if own.setdefault(digest, source) != source:
                copies += 1
                report.remarks.add(RowError(source, "", _COPY.format(own[digest])))
        packed = data.pack(cache)
        report.numbers = _numbers(data, packed, copies, None if report.name == "train" else leaks)
        if with_steps is not None:
            report.numbers.append(_steps(len(packed.rows), data.batch_size, *with_steps))
        report.notes = cache.statistics.lines(data.options)[1:]
        report.lengths = _histogram(cache.lengths)
        report.shown = _first(cache, show)


def _readable(patterns: Sequence[str], data: SFTDataModule, problems: list[str]) -> list[str]:
    """The files that the patterns match, as `expand` has them; what cannot be found or read becomes a problem."""
    found: list[str] = []
    for pattern in patterns:
        try:
            found += expand([pattern])
        except ValueError as error:
            problems.append(str(error))
    readable: list[str] = []
    for path in dict.fromkeys(found):
        try:
            remembered_scan(path, data.cache_dir or default_cache_dir())
            readable.append(path)
        except ValueError as error:
            problems.append(str(error))
    return readable


def _conversations(cache: TokenCache) -> Iterator[tuple[bytes, str]]:
    """Yields (digest of tokens and targets, source) of each row that has samples, which stand together."""
    digest, source = hashlib.blake2b(digest_size=DIGEST_BYTES), ""
    for index in range(len(cache)):
        document = cache.document(index)
        if source and document.source != source:
            yield digest.digest(), source
            digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        source = document.source
        digest.update(np.asarray([len(document.input_ids), len(document.target_spans)]).tobytes())
        digest.update(document.input_ids.tobytes() + document.target_spans.tobytes())
    yield digest.digest(), source


def _first(cache: TokenCache, conversations: int) -> list[Document]:
    """All samples of the first conversations."""
    shown: list[Document] = []
    sources: set[str] = set()
    for index in range(len(cache)):
        document = cache.document(index)
        sources.add(document.source)
        if len(sources) > conversations:
            break
        shown.append(document)
    return shown


def _numbers(data: SFTDataModule, packed: PackedSet, copies: int, leaks: int | None) -> list[tuple[str, str]]:
    statistics, lengths = packed.cache.statistics, packed.cache.lengths
    middle, most, nearly_all = np.percentile(lengths, [50, 90, 99], method="higher").astype(int)
    return [
        ("rows", f"{statistics.rows:,}"),
        ("turns", f"{statistics.turns:,}"),
        ("samples", f"{statistics.samples:,} ({data.options.history_reasoning} reasoning of earlier turns)"),
        ("tokens", f"{statistics.tokens:,}"),
        ("trained tokens", f"{statistics.targets:,} ({statistics.targets / statistics.tokens:.1%})"),
        ("tokens a sample", f"median {middle:,}, 90% {most:,}, 99% {nearly_all:,}, longest {lengths.max():,}"),
        ("cut to max_length", f"{statistics.truncated:,} samples"),
        ("dropped", f"{statistics.dropped_truncated + statistics.dropped_overlong:,} samples"),
        ("without targets", f"{statistics.rows_without_targets:,} rows"),
        ("copies of another row", f"{copies:,} rows"),
        *([("also in train", f"{leaks:,} rows")] if leaks is not None else []),
        (
            "packed" if data.packing else "not packed",
            f"{len(packed.rows):,} rows of up to {data.options.max_length:,} tokens, "
            f"{packed.fill(data.options.max_length):.1%} full",
        ),
    ]


def _steps(rows: int, batch_size: int, replicas: int, accumulation: int) -> tuple[str, str]:
    rows_per_step = replicas * batch_size * accumulation
    return (
        "optimizer steps",
        f"{-(-rows // rows_per_step):,} an epoch, of {rows_per_step:,} packed rows "
        f"(data parallel {replicas} x batch {batch_size} x accumulation {accumulation})",
    )


def _histogram(lengths: npt.NDArray[np.integer]) -> list[tuple[int, int, int]]:
    """Samples by length, in bins that double: 1, 2 to 3, 4 to 7, ...; from the first to the last that has any."""
    powers = np.log2(lengths).astype(int)  # exact at powers of two
    counts = np.bincount(powers)
    return [(2**power, 2 ** (power + 1) - 1, int(counts[power])) for power in range(powers.min(), powers.max() + 1)]
