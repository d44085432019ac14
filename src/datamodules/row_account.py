"""The account of what became of every row: counts, what is wrong, what is suspicious."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from src.errors import UserError
from src.units import counted

from .findings import Findings

NAMED_ROWS = 5  # rows without targets that are named in the log


@dataclass
class Statistics:
    """What became of the rows. Counts are of samples, except `rows`, `skipped`, `turns` and `rows_without_targets`."""

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
    # power -> [samples, tokens] of samples with more than 2**(power - 1) and up to 2**power tokens, before max_length.
    whole: dict[str, list[int]] = field(default_factory=dict)

    def add(self, other: "Statistics") -> None:
        for item in fields(self):
            if item.name not in ("longest", "whole"):
                setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))
        del self.named_rows[NAMED_ROWS:]
        self.longest = max(self.longest, other.longest)
        for power, (samples, tokens) in other.whole.items():
            self._add_whole(power, samples, tokens)

    def add_without_targets(self, source: str) -> None:
        """Counts a row that has nothing to train on."""
        self.rows_without_targets += 1
        if len(self.named_rows) < NAMED_ROWS:
            self.named_rows.append(source)

    def add_length(self, length: int) -> None:
        """Counts a sample by its length before max_length."""
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

    def lines(self, max_length: int) -> list[str]:
        """The account as lines for the log."""
        share = self.targets / max(self.tokens, 1)
        limit = f"{max_length:,}"
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
    """The findings on the rows of a span, or on all rows.

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

    def wrong(self, skip_rows: bool) -> list[ValueError]:
        """Why training refuses the data: the files' problems, and one error per kind unless bad rows are skipped."""
        rows = [] if skip_rows else [examples[0] for _, examples in self.errors.by_kind()]
        return [*map(UserError, self.problems), *rows]

    def add(self, other: "Report") -> None:
        """Adds the report of later rows."""
        self.statistics.add(other.statistics)
        self.errors.update(other.errors)
        self.remarks.update(other.remarks)
        self.unread.update(other.unread)
        for path, counts in other.formats.items():
            for name, row in counts.items():
                self.formats.setdefault(path, {}).setdefault(name, row)

    def rename_files(self, names: dict[str, str]) -> None:
        """Renames the files of rows, to other files with the same content."""

        def renamed(source: str) -> str:
            path, _, row = source.rpartition(":")
            return f"{names.get(path, path)}:{row}"

        self.statistics.named_rows = [renamed(source) for source in self.statistics.named_rows]
        for findings in (self.errors, self.remarks, self.unread):
            for _, examples in findings.kinds.values():
                examples[:] = [[renamed(source), *rest] for source, *rest in examples]

    def mixed_files(self) -> list[str]:
        """The problems of files whose rows have different formats."""
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
