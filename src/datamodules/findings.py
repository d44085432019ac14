"""Keeps any number of row errors or remarks in constant memory; remarks are what is suspicious, not wrong."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from .rows import RowError

EXAMPLES = 100  # of each kind that are kept
KINDS = 100  # further ones are counted together, since data can produce kinds without end

_OTHER = "other kinds"


class Findings:
    """Row errors by kind: the count and the first `examples`.

    A kind is a field, without indices, and a constraint (the text after the first "; "). Processes exchange `kinds`,
    kind -> [count, [[source, field, problem], ...]], as JSON.
    """

    def __init__(self, kinds: dict[str, tuple[int, list[list[str]]]] | None = None, examples: int = EXAMPLES) -> None:
        self.kinds, self.examples = dict(kinds or {}), examples

    def __len__(self) -> int:
        """The count over all kinds."""
        return sum(count for count, _ in self.kinds.values())

    def add(self, error: RowError) -> None:
        kind = f"{re.sub(r'[0-9]+', '', error.field)} {error.problem.split('; ', 1)[-1]}"
        self._add(kind, 1, [[error.source, error.field, error.problem]])

    def update(self, other: "Findings") -> None:
        """Adds the findings of later rows."""
        for kind, (count, examples) in other.kinds.items():
            self._add(kind, count, examples)

    def by_kind(self) -> Iterator[tuple[int, list[RowError]]]:
        """Yields (count, the first of them) of each kind."""
        for count, examples in self.kinds.values():
            yield count, [RowError(*example) for example in examples]

    def _add(self, kind: str, count: int, examples: list[list[str]]) -> None:
        if kind not in self.kinds and len(self.kinds) >= KINDS:
            kind = _OTHER
        before, kept = self.kinds.get(kind, (0, []))
        self.kinds[kind] = (before + count, [*kept, *examples][: self.examples])


def row_remarks(messages: Sequence[dict[str, Any]], source: str) -> Iterator[RowError]:
    """Remarks on a sound row: empty answers."""
    for index, message in enumerate(messages):
        trained = message["role"] == "assistant" and message.get("loss") is not False
        answer = (message.get("content") or "").strip()
        if trained and not message.get("tool_calls") and (not answer or answer.endswith("</think>")):
            field = f"messages[{index}].content"
            yield RowError(source, field, "has no answer; the model learns to end its turn there: give one or drop it")


def unread_remark(field: str, source: str) -> RowError:
    """A remark on an unread field; it names the first row only, since most likely all rows have it."""
    return RowError(
        source, field, "is not read; --data.fields maps a field to one of ours, or to null where it may be left out"
    )
