"""Many row errors or remarks in constant memory, and the remarks: what is suspicious in a row though not wrong."""

import re
from collections.abc import Callable, Iterator
from typing import Any

from .reader import RowError

EXAMPLES = 100  # of each kind that are kept
KINDS = 100  # beyond which new ones are counted together: data can make them up without end

_OTHER = "other kinds"
_KEYS = ("role", "content", "reasoning_content", "tool_calls", "loss")


class Findings:
    """Row errors by kind: how many there are and the first `EXAMPLES` of them.

    Of one kind are errors of the same field, indices aside, and the same constraint (what follows the first "; ").
    `kinds`, kind -> [count, [[source, field, problem], ...]], is what travels between processes as JSON.
    """

    def __init__(self, kinds: dict[str, tuple[int, list[list[str]]]] | None = None) -> None:
        self.kinds = dict(kinds or {})

    def __len__(self) -> int:
        """How many there are of all kinds."""
        return sum(count for count, _ in self.kinds.values())

    def add(self, error: RowError) -> None:
        kind = f"{re.sub(r'[0-9]+', '', error.field)} {error.problem.split('; ', 1)[-1]}"
        self._add(kind, 1, [[error.source, error.field, error.problem]])

    def update(self, other: "Findings") -> None:
        """Adds those of the rows behind ours."""
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
        self.kinds[kind] = (before + count, [*kept, *examples][:EXAMPLES])


def row_remarks(row: dict[str, Any], source: str, template_reads: Callable[[str], bool]) -> Iterator[RowError]:
    """What is suspicious in a sound row: fields that training ignores, answers without a word.

    Args:
        template_reads: whether the chat template looks at a message's field of this name.
    """
    if row.get("tools"):
        yield RowError(
            source,
            "tools",
            "is given beside the messages, where it is ignored; write the tools into the system message, as they are "
            "when the model is served",
        )
    ignored: set[str] = set()
    for index, message in enumerate(row["messages"]):
        field = f"messages[{index}]"
        for key, value in message.items():
            if value is not None and key not in _KEYS and key not in ignored and not template_reads(key):
                ignored.add(key)
                yield RowError(
                    source,
                    f"{field}.{key}",
                    f"is ignored; training reads {', '.join(_KEYS)} and what the chat template asks for",
                )
        trained = message["role"] == "assistant" and message.get("loss") is not False
        answer = (message.get("content") or "").strip()
        if trained and not message.get("tool_calls") and (not answer or answer.endswith("</think>")):
            yield RowError(
                source, f"{field}.content", "has no answer; the model learns to end its turn there: give one or drop it"
            )
