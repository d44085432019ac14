"""Rows to samples that fit: rendering, the overlong policy, and an account of what became of every row."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .chat_template import ChatTemplate, HistoryReasoning, Sample
from .findings import Findings, row_remarks
from .reader import RowError, Span, read_span, row_errors
from .sequence_shard import target_counts

Overlong = Literal["truncate", "drop", "error"]

NAMED_ROWS = 5  # rows without targets that are named in the log


@dataclass(frozen=True)
class TokenizeOptions:
    """What decides, beside files and tokenizer, which samples there are."""

    max_length: int
    overlong: Overlong = "truncate"
    history_reasoning: HistoryReasoning = "strip"


@dataclass
class Statistics:
    """What became of the rows. Counts of samples but for `rows`, `turns` and `rows_without_targets`."""

    rows: int = 0
    turns: int = 0  # messages of the sound rows
    rows_without_targets: int = 0
    samples: int = 0
    tokens: int = 0
    targets: int = 0
    truncated: int = 0
    dropped_truncated: int = 0  # no target left within max_length
    dropped_overlong: int = 0
    named_rows: list[str] = field(default_factory=list)  # the first rows without targets

    def add(self, other: "Statistics") -> None:
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))
        del self.named_rows[NAMED_ROWS:]

    def lines(self, options: TokenizeOptions) -> list[str]:
        """What a person should read once, a line each."""
        share = self.targets / max(self.tokens, 1)
        lines = [
            f"{self.rows:,} rows -> {self.samples:,} samples, {self.tokens:,} tokens, {self.targets:,} of them "
            f"targets ({share:.1%})"
        ]
        if self.rows_without_targets:
            named = ", ".join(self.named_rows) + (", ..." if self.rows_without_targets > len(self.named_rows) else "")
            lines.append(f"{self.rows_without_targets:,} rows dropped, nothing to train on: {named}")
        if self.truncated:
            lines.append(f"{self.truncated:,} samples cut to max_length {options.max_length:,}")
        if self.dropped_truncated:
            lines.append(f"{self.dropped_truncated:,} samples dropped, no target within {options.max_length:,} tokens")
        if self.dropped_overlong:
            lines.append(f"{self.dropped_overlong:,} samples dropped, longer than {options.max_length:,} tokens")
        return lines


@dataclass
class Report:
    """What is to say of the rows of a span, or of all of them."""

    statistics: Statistics = field(default_factory=Statistics)
    errors: Findings = field(default_factory=Findings)
    remarks: Findings = field(default_factory=Findings)

    def add(self, other: "Report") -> None:
        """Adds that of the rows behind ours."""
        self.statistics.add(other.statistics)
        self.errors.update(other.errors)
        self.remarks.update(other.remarks)

    def to_json(self) -> dict[str, Any]:
        return {"statistics": asdict(self.statistics), "errors": self.errors.kinds, "remarks": self.remarks.kinds}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Report":
        return cls(Statistics(**content["statistics"]), Findings(content["errors"]), Findings(content["remarks"]))


def tokenize_spans(
    work: list[tuple[int, int, Span]],
    template: ChatTemplate,
    options: TokenizeOptions,
    reports: Path,
    all_errors: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yields the samples of some spans and leaves a report for each, with the first error, which ends all work, or with
    `all_errors`.

    Errors travel by file: an exception would lose its type on the way through `datasets` and its processes.
    """
    failed = reports.parent / "failed"
    for index, file, span in work:
        if failed.exists():
            return
        report = Report()
        for row, value in read_span(span):
            source = f"{span.path}:{row}"
            try:
                samples = _row_samples(value, source, template, options, report)
            except RowError as error:
                found = [] if isinstance(value, RowError) else list(row_errors(value, source))
                for each in found or [error]:  # what only rendering shows comes alone
                    report.errors.add(each)
                if not all_errors:
                    failed.touch()
                    break
                continue
            for sample in samples:
                yield {"file": file, "row": row, **_columns(sample)}
        (reports / f"{index:08d}.json").write_text(json.dumps(report.to_json()))


def _row_samples(
    value: Any, source: str, template: ChatTemplate, options: TokenizeOptions, report: Report
) -> list[Sample]:
    """The samples of one row that fit."""
    statistics = report.statistics
    statistics.rows += 1
    samples = render_row(value, source, template)
    if options.overlong == "error":
        for sample in samples:
            _refuse_overlong(sample, source, options)
    statistics.turns += len(value["messages"])
    for remark in row_remarks(value, source, template.reads):
        report.remarks.add(remark)
    if not samples:
        statistics.rows_without_targets += 1
        if len(statistics.named_rows) < NAMED_ROWS:
            statistics.named_rows.append(source)
    fitted = [sample for sample in (_fit(sample, options, statistics) for sample in samples) if sample is not None]
    for sample in fitted:
        statistics.samples += 1
        statistics.tokens += len(sample.input_ids)
        statistics.targets += target_counts(sample.target_spans)[0]
    return fitted


def _columns(sample: Sample) -> dict[str, Any]:
    targets, mtp_targets = target_counts(sample.target_spans)
    return {
        "input_ids": np.asarray(sample.input_ids, dtype=np.int32),
        "target_spans": np.asarray(sample.target_spans, dtype=np.int32).reshape(-1),
        "length": len(sample.input_ids),
        "targets": targets,
        "mtp_targets": mtp_targets,
    }


def render_row(value: Any, source: str, template: ChatTemplate) -> list[Sample]:
    """Samples of one row as `reader.read_span` yields it.

    Raises:
        RowError: the first thing that is wrong with it.
    """
    if isinstance(value, RowError):
        raise value
    for error in row_errors(value, source):
        raise error
    try:
        return template.render(value["messages"])
    except ValueError as error:
        raise RowError(source, "messages", str(error)) from error


def _refuse_overlong(sample: Sample, source: str, options: TokenizeOptions) -> None:
    length, limit = len(sample.input_ids), options.max_length
    if length > limit:
        raise RowError(
            source,
            "messages",
            f"renders to {length:,} tokens, above max_length {limit:,}; shorten the conversation, raise max_length, "
            "or set overlong to 'truncate' or 'drop'",
        )


def _fit(sample: Sample, options: TokenizeOptions, statistics: Statistics) -> Sample | None:
    """The sample within max_length by the overlong policy; None where it is dropped."""
    limit = options.max_length
    if len(sample.input_ids) <= limit:
        return sample
    if options.overlong == "drop":
        statistics.dropped_overlong += 1
        return None
    spans = [(start, min(stop, limit)) for start, stop in sample.target_spans if start < limit]
    if not target_counts(spans)[0]:
        statistics.dropped_truncated += 1
        return None
    statistics.truncated += 1
    return Sample(sample.input_ids[:limit], spans)
