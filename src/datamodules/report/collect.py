"""`check-data`: everything wrong with a run's data, what it comes to, and what is suspicious, before the run.

It goes through the same reading, rendering, masking and packing as training, and leaves the cache that training opens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from src.datamodules.cache import TokenCache, nothing_to_train_on, open_or_check
from src.datamodules.collate import Document
from src.datamodules.copies import Conversations, Copies, first_samples
from src.datamodules.files import look_up
from src.datamodules.findings import Findings
from src.datamodules.limits import Limits, check_training, check_validation
from src.datamodules.packed_set import PackedSet
from src.datamodules.row_account import Statistics
from src.datamodules.sft import SFTDataModule
from src.errors import UserError
from src.units import counted


class Cut(NamedTuple):
    """Of the samples as they are before max_length."""

    max_length: int
    fit: int  # samples that fit, and not into half of it
    samples: int  # that it cuts
    tokens: int  # that they lose, of `of`
    of: int


@dataclass
class SetReport:
    """The data of training, or of a validation set."""

    name: str  # train, val, or "val NAME"
    problems: list[str] = field(default_factory=list)  # of whole files
    errors: Findings = field(default_factory=Findings)  # of rows
    skipped: Findings = field(default_factory=Findings)  # errors of rows that are skipped
    remarks: list[Findings] = field(default_factory=list)
    numbers: list[tuple[str, str]] = field(default_factory=list)  # (what, how much), to be read
    notes: list[str] = field(default_factory=list)  # what became of rows that do not fit
    lengths: list[Cut] = field(default_factory=list)  # what each max_length would cut
    shown: list[Document] = field(default_factory=list)

    @property
    def wrong(self) -> int:
        return len(self.problems) + len(self.errors)


def check(
    data: SFTDataModule, replicas: int | None, accumulation: int, show: int = 0, limits: Limits | None = None
) -> list[SetReport]:
    """Reports on the training and the validation files of a datamodule that has its tokenizer.

    Args:
        replicas: data-parallel size; None where it is not known.
        accumulation: micro-steps of an optimizer step.
        show: conversations of each set to return as training sees them, evenly spread over the set.
        limits: of the trainer, to agree with the data; by default none.
    """
    limits, train = limits or Limits(), SetReport("train")
    trained = _check_files(train, data, data.train_files, show, None)
    if trained is not None and replicas is not None:
        train.numbers.append(_steps(trained[1], data.batch_size, replicas, accumulation))
        with _noted(train):
            check_training(trained[1], replicas, data.batch_size, accumulation, limits)
    reports = [train]
    sets = {"val": data.val_files or [], **{f"val {name}": files for name, files in data.val_sets.items()}}
    for name, files in sets.items():
        if files or name != "val":
            reports.append(SetReport(name))
            validated = _check_files(reports[-1], data, files, show, None if trained is None else trained[0])
            if validated is not None and replicas is not None:
                with _noted(reports[-1]):
                    check_validation(name, validated[1], replicas, data.batch_size, limits.limit_val_batches)
    return reports


@contextmanager
def _noted(report: SetReport) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        report.problems.append(str(error))


def _check_files(
    report: SetReport, data: SFTDataModule, files: Sequence[str], show: int, train: Conversations | None
) -> tuple[Conversations, int] | None:
    """Returns the conversations, and how many packed rows an epoch has; None where there are none.

    Args:
        train: the training data's conversations, which those of a validation set should not be among.
    """
    assert data.tokenizer is not None
    paths, problems = look_up(files)
    report.problems += map(str, problems)
    if not paths:
        if not report.problems:
            report.problems.append(f"{report.name}: no files; name at least one, or leave the set out")
        return None
    with open_or_check(paths, data.tokenizer, data.options, data.cache_dir) as cache:
        report.problems += cache.report.problems
        if data.options.bad_rows == "skip":
            report.skipped = cache.report.errors
        else:
            report.errors = cache.report.errors
        report.remarks = [cache.report.remarks, cache.report.unread]
        if not len(cache):
            report.problems.append(nothing_to_train_on(paths, cache.report, data.options))
            return None
        conversations = Conversations.of(cache)
        copies = Copies.among(conversations, train)
        report.remarks.append(copies.remarks)
        is_train, mixed = report.name == "train", []
        packed = data.pack(cache)
        if is_train and data.train_weights is not None and not report.problems:
            with _noted(report):
                packed = data.pack(cache, data.train_weights)
                mixed = packed.mixture.lines() if packed.mixture is not None else []
        report.numbers = [*_numbers(data, packed, copies, is_train), *mixed]
        report.notes = cache.summary(data.options)[1:]
        report.lengths = cuts(cache.statistics)
        report.shown = _spread(cache, show)
        return conversations, packed.rows_an_epoch


def _spread(cache: TokenCache, conversations: int) -> list[Document]:
    """All samples of some conversations, evenly spread from the first to the last."""
    starts = first_samples(cache)
    picked = np.unique(np.linspace(0, len(starts) - 1, min(conversations, len(starts))).round().astype(np.int64))
    ends = np.append(starts[1:], len(cache))
    return [cache.document(index) for place in picked for index in range(starts[place], ends[place])]


def _numbers(data: SFTDataModule, packed: PackedSet, copies: Copies, is_train: bool) -> list[tuple[str, str]]:
    statistics, lengths = packed.cache.statistics, packed.cache.lengths
    middle, most, nearly_all = np.percentile(lengths, [50, 90, 99], method="higher").astype(int)
    return [
        ("rows", f"{statistics.rows:,}"),
        *([("skipped", counted(statistics.skipped, "row"))] if statistics.skipped else []),
        ("turns", f"{statistics.turns:,}"),
        ("samples", f"{statistics.samples:,} (history_reasoning {data.options.history_reasoning})"),
        ("tokens", f"{statistics.tokens:,}"),
        ("trained tokens", f"{statistics.targets:,} ({statistics.targets / statistics.tokens:.1%})"),
        ("tokens per sample", f"median {middle:,}, 90% {most:,}, 99% {nearly_all:,}, longest {statistics.longest:,}"),
        ("cut to max_length", counted(statistics.truncated, "sample")),
        ("dropped", counted(statistics.dropped_truncated + statistics.dropped_overlong, "sample")),
        ("without targets", counted(statistics.rows_without_targets, "row")),
        ("copies of another row", counted(copies.copies, "row")),
        *([] if is_train else [("also in train", counted(copies.leaks, "row"))]),
        (
            "packed" if data.packing else "not packed",
            f"{counted(len(packed.rows), 'row')} of up to {data.options.max_length:,} tokens, "
            f"{packed.fill(data.options.max_length):.1%} full",
        ),
    ]


def _steps(rows: int, batch_size: int, replicas: int, accumulation: int) -> tuple[str, str]:
    rows_per_step = replicas * batch_size * accumulation
    return (
        "optimizer steps",
        f"{-(-rows // rows_per_step):,} per epoch, of {counted(rows_per_step, 'packed row')} "
        f"(data parallel {replicas} x batch {batch_size} x accumulation {accumulation})",
    )


def cuts(statistics: Statistics) -> list[Cut]:
    """What each power of two would cut as max_length, from the first into which a sample fits to one that cuts none."""
    powers = sorted(map(int, statistics.whole))
    every = range(powers[0], powers[-1] + 1) if powers else ()
    fit = {power: statistics.whole.get(str(power), [0, 0])[0] for power in every}
    tokens = sum(count for _, count in statistics.whole.values())
    return [Cut(2**power, fit[power], *statistics.cut_at(power), tokens) for power in every]
