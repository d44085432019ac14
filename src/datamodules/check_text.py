"""The report of `check-data` for a terminal."""

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerFast

from .check import SetReport
from .findings import Findings
from .segments import printable, segments
from .sequence_shard import Document

EXAMPLES = 20  # of each kind; the HTML page lists more
BAR = 40  # characters of the longest

_GREEN, _REVERSE, _RESET = "\x1b[32m", "\x1b[7m", "\x1b[0m"
OPEN, CLOSE = "⟦", "⟧"  # around trained text where there is no colour


def report_lines(reports: Sequence[SetReport], tokenizer: PreTrainedTokenizerFast, colour: bool) -> Iterator[str]:
    """Yields the report's lines, conversations first, so that what is wrong stands last."""
    if any(report.shown for report in reports):
        legend = (
            f"{_GREEN}trained on{_RESET}, {_REVERSE}special token{_RESET}" if colour else f"{OPEN}trained on{CLOSE}"
        )
        yield from ("", f"conversations as training sees them ({legend})")
    for report in reports:
        for document in report.shown:
            count = sum(stop - start for start, stop in document.target_spans)
            source = printable(document.source)
            yield from ("", f"--- {report.name}: {source}, {len(document.input_ids):,} tokens, {count:,} trained")
            yield show(document, tokenizer, colour)
    for report in reports:
        yield from ("", report.name)
        width = max((len(what) for what, _ in report.numbers), default=0)
        for what, how_much in report.numbers:
            yield f"  {what:<{width}}  {how_much}"
        if report.lengths:
            yield "  tokens a sample:"
            yield from _bars(report.lengths)
        for note in report.notes:
            yield f"  note: {printable(note)}"
        yield from _listed("skipped", report.skipped)
        for remarks in report.remarks:
            yield from _listed("suspicious", remarks)
        for problem in report.problems:
            yield f"  WRONG: {printable(problem)}"
        yield from _listed("WRONG", report.errors)


def verdict(wrong: int) -> str:
    return (
        f"{wrong:,} problem{'s' if wrong > 1 else ''}: training would refuse this data" if wrong else "nothing is wrong"
    )


def show(document: Document, tokenizer: PreTrainedTokenizerFast, colour: bool) -> str:
    """A document's text with its trained parts in green and special tokens reversed, or with trained parts in ⟦⟧."""
    parts: list[str] = []
    inside = False
    for segment in segments(document, tokenizer):
        if colour:
            style = _GREEN * segment.trained + _REVERSE * segment.special
            parts.append(f"{style}{segment.text}{_RESET}" if style else segment.text)
            continue
        if segment.trained != inside:
            parts.append(OPEN if segment.trained else CLOSE)
            inside = segment.trained
        parts.append(segment.text)
    return "".join(parts) + CLOSE * inside


def _bars(lengths: list[tuple[int, int, int]]) -> Iterator[str]:
    most = max(count for *_, count in lengths)
    width = len(f"{lengths[-1][1]:,}")
    for first, last, count in lengths:
        bar = "█" * -(-BAR * count // most)
        yield f"    {first:>{width},} to {last:>{width},}  {bar}{' ' * bool(bar)}{count:,}"


def _listed(word: str, findings: Findings) -> Iterator[str]:
    for count, examples in findings.by_kind():
        yield f"  {word}, {count:,} time{'s' if count > 1 else ''}:"
        shown = examples[:EXAMPLES]
        for error in shown:
            yield f"    {printable(str(error))}"
        if count > len(shown):
            yield f"    ... and {count - len(shown):,} more of this kind"
