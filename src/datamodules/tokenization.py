"""Rows to samples that fit: rendering and the overlong policy."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerFast

from .chat_template import ChatTemplate, HistoryReasoning, Sample
from .collate import target_counts
from .control_tokens import ControlTokens
from .findings import row_remarks, unread_remark
from .formats import Conversation, Format, read_row
from .reader import Span, read_span
from .row_account import Report, Statistics
from .turns import Misfit

Overlong = Literal["truncate", "drop", "error"]
BadRows = Literal["error", "skip"]


@dataclass(frozen=True)
class TokenizeOptions:
    """The options that, with files and tokenizer, determine the samples."""

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


def tokenize_spans(
    work: list[tuple[int, int, Span]],
    template: ChatTemplate,
    options: TokenizeOptions,
    reports: Path,
    all_errors: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yields the samples of some spans and writes a report for each. The report has all errors with `all_errors` or if
    bad rows are skipped (which are then listed); else those of the first bad row, which ends all work.

    Errors travel in files, since an exception loses its type on its way through `datasets` and its processes.
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
    """A row's samples that fit; none, and an error, if it cannot be rendered."""
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
    except Exception as error:  # of a library, about this row: name it and go on with the others
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
        statistics.add_without_targets(conversation.source)
    for sample in samples:
        statistics.add_length(len(sample.input_ids))
    fitted = [sample for sample in (_fit(sample, options, statistics) for sample in samples) if sample is not None]
    for sample in fitted:
        statistics.samples += 1
        statistics.tokens += len(sample.input_ids)
        statistics.targets += target_counts(sample.target_spans)[0]
    return fitted


def _columns(samples: list[Sample]) -> Iterator[dict[str, Any]]:
    """The columns of a row's samples; all carry the same digest, of all of them."""
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
    """The sample within max_length by the overlong policy; None if dropped."""
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
