"""The report of `check-data` as one HTML page that needs nothing else."""

from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby

from transformers import PreTrainedTokenizerFast

from src.datamodules.findings import Findings

from .collect import Cut, SetReport
from .segments import printable, segments
from .text import verdict

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a;
  background: #fff; }
td { padding: 0 1.5rem 0 0; vertical-align: top; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f5f5; padding: 1rem; }
li { overflow-wrap: anywhere; }
.wrong { color: #a40000; }
mark { background: #c7efcf; color: #0b3d17; border-bottom: 2px solid #1b7a34; }
.special { border: 1px solid #555; border-radius: 3px; font-size: 0.85em; }
rect { fill: #1f5fa8; }
"""


def page(reports: Sequence[SetReport], tokenizer: PreTrainedTokenizerFast, title: str) -> str:
    """The whole page; every text of the data is escaped."""
    return "\n".join(_lines(reports, tokenizer, title))


def _lines(reports: Sequence[SetReport], tokenizer: PreTrainedTokenizerFast, title: str) -> Iterator[str]:
    yield "<!DOCTYPE html>"
    yield f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style></head>'
    yield f"<body><h1>{escape(title)}</h1>"
    wrong = sum(report.wrong for report in reports)
    yield f"<p{' class=wrong' if wrong else ''}><strong>{verdict(wrong)}</strong></p>"
    for report in reports:
        yield f"<h2>{report.name}</h2>"
        yield from _list("Wrong", len(report.problems), [printable(problem) for problem in report.problems])
        yield from _findings("Wrong", report.errors)
        if report.numbers:
            rows = "".join(f"<tr><td>{escape(what)}</td><td>{escape(text)}</td></tr>" for what, text in report.numbers)
            yield f"<table>{rows}</table>"
        if report.lengths:
            yield "<h3>Tokens per sample, before max_length</h3>"
            yield _bars(report.lengths)
        if report.notes:
            yield from _list("Notes", len(report.notes), report.notes)
        yield from _findings("Skipped", report.skipped)
        for remarks in report.remarks:
            yield from _findings("Suspicious", remarks)
    if any(report.shown for report in reports):
        yield "<h2>Conversations as training sees them</h2>"
        yield '<p>Legend: <mark>trained on</mark>, <span class="special">special token</span></p>'
    for report in reports:
        for document in report.shown:
            count = sum(stop - start for start, stop in document.target_spans)
            yield f"<h3>{report.name}: {escape(document.source)}</h3>"
            yield f"<p>{len(document.input_ids):,} tokens, {count:,} trained</p><pre>"
            for trained, group in groupby(segments(document, tokenizer), key=lambda segment: segment.trained):
                text = "".join(
                    f'<span class="special">{escape(segment.text)}</span>' if segment.special else escape(segment.text)
                    for segment in group
                )
                yield f"<mark>{text}</mark>" if trained else text
            yield "</pre>"
    yield "</body></html>"


def _findings(word: str, findings: Findings) -> Iterator[str]:
    for count, examples in findings.by_kind():
        yield from _list(word, count, [printable(str(error)) for error in examples])


def _list(word: str, count: int, items: Sequence[str]) -> Iterator[str]:
    if not items:
        return
    style = " class=wrong" if word == "Wrong" else ""
    more = f"<li>... and {count - len(items):,} more of this kind</li>" if count > len(items) else ""
    yield f"<h3{style}>{word}: {count:,}</h3><ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}{more}</ul>"


def _bars(lengths: list[Cut]) -> str:
    most = max(cut.fit for cut in lengths)
    rows = []
    for place, cut in enumerate(lengths):
        top = place * 24
        lost = f", would cut {cut.samples:,} samples" if cut.samples else ""
        rows.append(
            f'<text x="150" y="{top + 16}" text-anchor="end">up to {cut.max_length:,}</text>'
            f'<rect x="160" y="{top + 3}" width="{300 * cut.fit / most:.1f}" height="18"></rect>'
            f'<text x="{168 + 300 * cut.fit / most:.1f}" y="{top + 16}">{cut.fit:,}{lost}</text>'
        )
    return (
        f'<svg role="img" aria-label="samples by length in tokens" width="680" height="{24 * len(lengths)}" '
        f'font-size="14">{"".join(rows)}</svg>'
    )
