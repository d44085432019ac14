"""Rows to samples that fit: rendering, the overlong policy, and an account of what became of every row."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerFast

from src.errors import UserError
from src.units import counted

from .chat_template import ChatTemplate, HistoryReasoning, Sample
from .collate import target_counts
from .control_tokens import ControlTokens
from .findings import Findings, row_remarks, unread_remark
from .formats import Conversation, Format, read_row
from .reader import Span, read_span
from .turns import Misfit

Overlong = Literal["truncate", "drop", "error"]
BadRows = Literal["error", "skip"]

NAMED_ROWS = 5  # rows without targets that are named in the log


@dataclass(frozen=True)
class TokenizeOptions:
    """What decides, beside files and tokenizer, which samples there are."""

    max_length: int
    overlong: Overlong = "truncate"
    history_reasoning: HistoryReasoning = "template"
    fields: dict[str, str | None] = field(default_factory=dict)
    format: Format = "auto"
    bad_rows: BadRows = "error"
    control_tokens: ControlTokens = "error"
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def template(self, tokenizer: PreTrainedTokenizerFast) -> ChatTemplate:
        return ChatTemplate(tokenizer, self.history_reasoning, self.control_tokens, self.chat_template_kwargs)


@dataclass
class Statistics:
    """What became of the rows. Counts of samples but for `rows`, `skipped`, `turns` and `rows_without_targets`."""

    rows: int = 0
    skipped: int = 0  # rows with errors, where they are skipped
    turns: int = 0  # messages of the sound rows
    rows_without_targets: int = 0
    samples: int = 0
    tokens: int = 0
    targets: int = 0
    truncated: int = 0
    dropped_truncated: int = 0  # no target left within max_length
    dropped_overlong: int = 0
    named_rows: list[str] = field(default_factory=list)  # the first rows without targets
    longest: int = 0  # tokens of a sample, before max_length
    # [samples, tokens] of the samples that fit into 2**power tokens and not into half as many, before max_length.
    whole: dict[str, list[int]] = field(default_factory=dict)

    def add(self, other: "Statistics") -> None:
        for item in fields(self):
            if item.name not in ("longest", "whole"):
                setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))
        del self.named_rows[NAMED_ROWS:]
        self.longest = max(self.longest, other.longest)
        for power, (samples, tokens) in other.whole.items():
            self._add_whole(power, samples, tokens)

    def add_length(self, length: int) -> None:
        """Counts a sample as it is before max_length."""
        self.longest = max(self.longest, length)
        self._add_whole(str((length - 1).bit_length()), 1, length)

    def _add_whole(self, power: str, samples: int, tokens: int) -> None:
        before = self.whole.get(power, [0, 0])
        self.whole[power] = [before[0] + samples, before[1] + tokens]

    def cut_at(self, power: int) -> tuple[int, int]:
        """Samples that a max_length of 2**power cuts, and the tokens that they lose."""
        longer = [counts for key, counts in self.whole.items() if int(key) > power]
        samples = sum(count for count, _ in longer)
        return samples, sum(tokens for _, tokens in longer) - samples * 2**power

    def lines(self, options: TokenizeOptions) -> list[str]:
        """What a person should read once, a line each."""
        share = self.targets / max(self.tokens, 1)
        limit = f"{options.max_length:,}"
        lines = [
            f"{counted(self.rows, 'row')} -> {counted(self.samples, 'sample')}, {self.tokens:,} tokens, "
            f"{self.targets:,} of them targets ({share:.1%})"
        ]
        if self.skipped:
            lines.append(f"{counted(self.skipped, 'bad row')} skipped")
        if self.rows_without_targets:
            named = ", ".join(self.named_rows) + (", ..." if self.rows_without_targets > len(self.named_rows) else "")
            lines.append(f"{counted(self.rows_without_targets, 'row')} dropped, nothing to train on: {named}")
        if self.truncated:
            lines.append(f"{counted(self.truncated, 'sample')} cut to max_length {limit}")
        if self.dropped_truncated:
            lines.append(f"{counted(self.dropped_truncated, 'sample')} dropped, no target within {limit} tokens")
        if self.dropped_overlong:
            lines.append(f"{counted(self.dropped_overlong, 'sample')} dropped, longer than {limit} tokens")
        return lines


@dataclass
class Report:
    """What is to say of the rows of a span, or of all of them.

    `remarks`: what is suspicious in a row; `unread`: fields that nothing reads, each with its first row alone;
    `formats`: of each file the formats that its rows have, each with its first row; `problems`: what is wrong with
    whole files.
    """

    statistics: Statistics = field(default_factory=Statistics)
    errors: Findings = field(default_factory=Findings)
    remarks: Findings = field(default_factory=Findings)
    unread: Findings = field(default_factory=lambda: Findings(examples=1))
    formats: dict[str, dict[str, str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def wrong(self, options: TokenizeOptions) -> list[ValueError]:
        """Why training refuses the data: what is wrong with files, and an error of each kind of the rows that are not
        to be skipped."""
        rows = [] if options.bad_rows == "skip" else [examples[0] for _, examples in self.errors.by_kind()]
        return [*map(UserError, self.problems), *rows]

    def add(self, other: "Report") -> None:
        """Adds that of the rows behind ours."""
        self.statistics.add(other.statistics)
        self.errors.update(other.errors)
        self.remarks.update(other.remarks)
        self.unread.update(other.unread)
        for path, counts in other.formats.items():
            for name, row in counts.items():
                self.formats.setdefault(path, {}).setdefault(name, row)

    def rename_files(self, names: dict[str, str]) -> None:
        """Gives the rows of files the names of other files with the same content."""

        def renamed(source: str) -> str:
            path, _, row = source.rpartition(":")
            return f"{names.get(path, path)}:{row}"

        self.statistics.named_rows = [renamed(source) for source in self.statistics.named_rows]
        for findings in (self.errors, self.remarks, self.unread):
            for _, examples in findings.kinds.values():
                examples[:] = [[renamed(source), *rest] for source, *rest in examples]

    def mixed_files(self) -> list[str]:
        """What is wrong with files whose rows have different formats."""
        return [
            f"{path} has rows of different formats, {' and '.join(f'{name} ({row})' for name, row in counts.items())}; "
            f"give one with --data.format, or split the file"
            for path, counts in self.formats.items()
            if len(counts) > 1
        ]

    def to_json(self) -> dict[str, Any]:
        findings = {name: getattr(self, name).kinds for name in ("errors", "remarks", "unread")}
        counts = {"statistics": asdict(self.statistics), "formats": self.formats, "problems": self.problems}
        return {**counts, **findings}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Report":
        return cls(
            Statistics(**content["statistics"]),
            Findings(content["errors"]),
            Findings(content["remarks"]),
            Findings(content["unread"], examples=1),
            content["formats"],
            content["problems"],
        )


def tokenize_spans(
    work: list[tuple[int, int, Span]],
    template: ChatTemplate,
    options: TokenizeOptions,
    reports: Path,
    all_errors: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yields the samples of some spans and leaves a report for each: with all errors where `all_errors`, or where bad
    rows are skipped, and a list of these; else with the errors of the first bad row, which ends all work.

    Errors travel by file: an exception would lose its type on the way through `datasets` and its processes.
    """
    failed = reports.parent / "failed"
    skip = options.bad_rows == "skip"
    for index, file, span in work:
        if failed.exists():
            return
        report = Report()
        skipped: list[dict[str, str]] = []
        for row, value in read_span(span):
            report.statistics.rows += 1
            conversation = read_row(value, f"{span.path}:{row}", options.fields, options.format, template.reads)
            if conversation.format is not None and options.format == "auto":
                report.formats.setdefault(span.path, {}).setdefault(conversation.format, conversation.source)
            for columns in _columns(_row_samples(conversation, template, options, report)):
                yield {"file": file, "row": row, **columns}
            for error in conversation.errors:
                report.errors.add(error)
                skipped.append({"row": error.source, "field": error.field, "problem": error.problem})
            if conversation.errors and skip:
                report.statistics.skipped += 1
            elif conversation.errors and not all_errors:
                failed.touch()
                break
        if skip and skipped:
            lines = "".join(json.dumps(line) + "\n" for line in skipped)
            (reports / f"{index:08d}.skipped").write_text(lines)
        (reports / f"{index:08d}.json").write_text(json.dumps(report.to_json()))


def _row_samples(
    conversation: Conversation, template: ChatTemplate, options: TokenizeOptions, report: Report
) -> list[Sample]:
    """The samples of one row that fit; none, and an error, where it cannot be rendered."""
    if conversation.errors:
        return []
    if conversation.tools and not template.declares_tools(conversation.messages):
        conversation.wrong(
            "tools",
            "is given, but the chat template does not write tools into the prompt; write them into the system message, "
            "as they are when the model is served, or leave them out: --data.fields '{tools: null}'",
        )
        return []
    try:
        samples = template.render(conversation.messages, conversation.tools)
    except Misfit as error:
        for where, problem in error.problems:
            conversation.wrong(conversation.place(where), problem)
        return []
    except ValueError as error:
        conversation.wrong("messages", str(error))
        return []
    except Exception as error:  # a library's, about this row: it is named, and the others are looked at all the same
        if isinstance(error, MemoryError):
            raise
        conversation.wrong("messages", f"cannot be rendered ({type(error).__name__}: {error})")
        return []
    if options.overlong == "error":
        for sample in samples:
            _refuse_overlong(sample, conversation, options)
        if conversation.errors:
            return []
    statistics = report.statistics
    statistics.turns += len(conversation.messages)
    for remark in row_remarks(conversation.messages[conversation.added :], conversation.source):
        report.remarks.add(remark)
    for name in conversation.unread:
        report.unread.add(unread_remark(name, conversation.source))
    if not samples:
        statistics.rows_without_targets += 1
        if len(statistics.named_rows) < NAMED_ROWS:
            statistics.named_rows.append(conversation.source)
    for sample in samples:
        statistics.add_length(len(sample.input_ids))
    fitted = [sample for sample in (_fit(sample, options, statistics) for sample in samples) if sample is not None]
    for sample in fitted:
        statistics.samples += 1
        statistics.tokens += len(sample.input_ids)
        statistics.targets += target_counts(sample.target_spans)[0]
    return fitted


def _columns(samples: list[Sample]) -> Iterator[dict[str, Any]]:
    """The columns of a row's samples, which have a digest of all of them in common."""
    arrays = [
        (np.asarray(sample.input_ids, dtype=np.int32), np.asarray(sample.target_spans, dtype=np.int32).reshape(-1))
        for sample in samples
    ]
    digest = hashlib.blake2b(digest_size=16)
    for input_ids, target_spans in arrays:
        digest.update(np.asarray([len(input_ids), len(target_spans)]).tobytes())
        digest.update(input_ids.tobytes() + target_spans.tobytes())
    halves = np.frombuffer(digest.digest(), dtype=np.int64)
    for sample, (input_ids, target_spans) in zip(samples, arrays, strict=True):
        targets, mtp_targets = target_counts(sample.target_spans)
        yield {
            "input_ids": input_ids,
            "target_spans": target_spans,
            "length": len(input_ids),
            "targets": targets,
            "mtp_targets": mtp_targets,
            "digest_0": int(halves[0]),
            "digest_1": int(halves[1]),
        }


def _refuse_overlong(sample: Sample, conversation: Conversation, options: TokenizeOptions) -> None:
    length, limit = len(sample.input_ids), options.max_length
    if length > limit:
        conversation.wrong(
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
