"""The report of `check-data` for a terminal."""

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerFast

from src.datamodules.collate import Document
from src.datamodules.findings import Findings
from src.datamodules.rows import RowError
from src.units import counted

from .collect import Cut, SetReport
from .segments import printable, segments

# What a terminal shows of each, so that 60 lines hold it; the HTML page has more.
KINDS, FEWER = 5, 2  # of what is wrong; of what is suspicious, skipped or noted
PLACES = 12  # of a kind, behind the first
NUMBERS, SETS = 15, 4
BARS, BAR = 6, 20  # lengths; characters of the longest bar
OF_VALIDATION = ("rows", "tokens", "tokens per sample", "cut to max_length", "also in train")  # of its numbers

_GREEN, _REVERSE, _RESET = "\x1b[32m", "\x1b[7m", "\x1b[0m"
OPEN, CLOSE = "⟦", "⟧"  # around trained text where there is no colour


def report_lines(reports: Sequence[SetReport], tokenizer: PreTrainedTokenizerFast, colour: bool) -> Iterator[str]:
    """Yields what is wrong, each kind once with its places; what is suspicious; the numbers; conversations last."""
    problems = [f"{report.name}: {problem}" for report in reports for problem in report.problems]
    for problem in problems[:KINDS]:
        yield f"WRONG: {printable(problem)}"
    if len(problems) > KINDS:
        yield f"... and {counted(len(problems) - KINDS, 'more problem')} of whole files"
    yield from _listed("WRONG", [report.errors for report in reports], KINDS)
    remarks = [remarks for report in reports for remarks in report.remarks]
    yield from _listed("suspicious", remarks, FEWER)
    yield from _listed("skipped", [report.skipped for report in reports], FEWER)
    train, *others = reports
    yield from ("", train.name)
    width = max((len(what) for what, _ in train.numbers), default=0)
    for what, how_much in train.numbers[:NUMBERS]:
        yield f"  {what:<{width}}  {how_much}"
    if train.lengths:
        yield "  samples by their tokens, and what a max_length of so many would cut:"
        yield from _bars(train.lengths)
    for note in train.notes[:FEWER]:
        yield f"  note: {printable(note)}"
    for report in others[:SETS]:
        numbers = [f"{what} {how_much}" for what, how_much in report.numbers if what in OF_VALIDATION]
        yield f"{report.name}  {'; '.join([*numbers, *map(printable, report.notes[:1])])}"
    if len(others) > SETS:
        yield f"... and {counted(len(others) - SETS, 'more set')}"
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


def verdict(wrong: int) -> str:
    return f"{counted(wrong, 'problem')}: training would refuse this data" if wrong else "nothing is wrong"


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


def _bars(cuts: list[Cut]) -> Iterator[str]:
    shown = cuts[-BARS:]
    shown[0] = shown[0]._replace(fit=sum(cut.fit for cut in cuts[: len(cuts) - len(shown) + 1]))
    most = max(cut.fit for cut in shown)
    width, widest = len(f"{shown[-1].max_length:,}"), max(len(f"{cut.fit:,}") for cut in shown)
    for cut in shown:
        bar = "█" * -(-BAR * cut.fit // most)
        lost = f"cuts {counted(cut.samples, 'sample')}, {cut.tokens / cut.of:.1%} of the tokens"
        lost = lost if cut.samples else "cuts none"
        yield f"    {cut.max_length:>{width},}  {cut.fit:>{widest},} {bar:<{BAR}}  {lost}"


def _listed(word: str, groups: Sequence[Findings], most: int) -> Iterator[str]:
    """Each kind once: the first row with its problem and remedy, then where else."""
    together = Findings()
    for findings in groups:
        together.update(findings)
    kinds = sorted(together.by_kind(), key=lambda kind: -kind[0])
    for count, examples in kinds[:most]:
        yield f"{word}, {counted(count, 'row')}: {printable(str(examples[0]))}"
        if count > 1:
            more = f" and {count - 1 - PLACES:,} more" if count - 1 > PLACES else ""
            yield f"    also {printable(_places(examples[1 : PLACES + 1]))}{more}"
    if len(kinds) > most:
        rest = sum(count for count, _ in kinds[most:])
        yield f"... and {counted(len(kinds) - most, 'more kind')}, {counted(rest, 'row')}; --html FILE lists them"


def _places(errors: Sequence[RowError]) -> str:
    """file.jsonl:1, 4, 9, other.jsonl:2"""
    rows: dict[str, list[str]] = {}
    for error in errors:
        path, _, row = error.source.rpartition(":")
        rows.setdefault(path, []).append(row)
    return ", ".join(f"{path}:{', '.join(of_file)}" for path, of_file in rows.items())
