"""Chat data from JSON, JSON Lines and Parquet files: where the rows are, the rows, and what is wrong with them.

A file is first scanned (`scan`) into spans of rows that processes read independently and in order, then read span by
span (`read_span`) in constant memory. `row_errors` lists everything that is wrong with one row, so that training can
stop at the first error and `check-data` can show them all.
"""

import glob
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

ROLES = ("system", "user", "assistant", "tool")

# A span ends at whichever comes first: small enough for processes to share the work and to hold in memory.
ROWS_PER_SPAN = 1024
BYTES_PER_SPAN = 8 << 20

_BOM = b"\xef\xbb\xbf"
_WHITESPACE = " \t\r\n"
_DECODER = json.JSONDecoder()


class RowError(ValueError):
    """One thing that is wrong with one row: `source` ("file:row"), `field` (a path inside the row) and `problem`,
    which states the value, the constraint and the remedy."""

    def __init__(self, source: str, field: str, problem: str) -> None:
        super().__init__(source, field, problem)
        self.source, self.field, self.problem = source, field, problem

    def __str__(self) -> str:
        return f"{self.source}: {self.field}: {self.problem}" if self.field else f"{self.source}: {self.problem}"


@dataclass(frozen=True)
class Span:
    """Consecutive rows of one file: bytes [start, stop) of JSON text, or the Parquet row group `start`."""

    path: str
    kind: Literal["jsonl", "json", "parquet"]
    first_row: int  # 1-based; the line number in JSON Lines
    start: int
    stop: int


@dataclass(frozen=True)
class FileScan:
    """What one pass over a file finds: a digest of its bytes and the spans that cover it."""

    path: str
    digest: str
    spans: tuple[Span, ...]


def expand(patterns: Sequence[str]) -> list[str]:
    """Files that the patterns match, in the patterns' order, sorted within each, each file once.

    Raises:
        ValueError: a pattern matches no file.
    """
    paths: dict[str, None] = {}
    for pattern in patterns:
        matches = sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())
        if not matches:
            raise ValueError(
                f"no file matches {pattern!r} (working directory {Path.cwd()}): give an existing JSON, JSONL or "
                "Parquet file, or a glob such as 'data/*.jsonl'"
            )
        paths.update(dict.fromkeys(matches))
    return list(paths)


def scan(path: str) -> FileScan:
    """Digest and spans of a file. JSON Lines and Parquet in constant memory; a JSON array's text is held whole."""
    if path.lower().endswith(".parquet"):
        return _scan_parquet(path)
    with open(path, "rb") as file:
        head = file.read(4096).removeprefix(_BOM).lstrip()
    return _scan_array(path) if head.startswith(b"[") else _scan_lines(path)


def read_span(span: Span) -> Iterator[tuple[int, Any]]:
    """Yields (row number from 1, the parsed row, or a `RowError` where it cannot be parsed)."""
    return {"jsonl": _read_lines, "json": _read_array, "parquet": _read_parquet}[span.kind](span)


def row_errors(row: Any, source: str) -> Iterator[RowError]:
    """Everything that is wrong with one row `{"messages": [{"role", "content", ...}, ...]}`."""
    if not isinstance(row, dict):
        yield RowError(source, "", f"is {_name(row)}; a row must be an object with 'messages'")
        return
    messages = row.get("messages")
    if not isinstance(messages, list):
        found = f"is {_name(messages)}" if "messages" in row else f"is missing (fields: {', '.join(map(str, row))})"
        yield RowError(source, "messages", f"{found}; it must be a list of {{role, content}} objects")
        return
    if not messages:
        yield RowError(source, "messages", "is empty; a conversation needs at least one user and one assistant turn")
    previous: dict[str, Any] | None = None
    for index, message in enumerate(messages):
        field = f"messages[{index}]"
        if not isinstance(message, dict):
            yield RowError(source, field, f"is {_name(message)}; it must be an object with 'role' and 'content'")
            return
        role = message.get("role")
        if role not in ROLES:
            yield RowError(source, f"{field}.role", f"is {role!r}; it must be one of {', '.join(ROLES)}")
            return  # without a role nothing more can be said about the order of turns
        for name, problem in _message_problems(message):
            yield RowError(source, f"{field}.{name}", problem)
        if misplaced := _order_problem(previous, message):
            yield RowError(source, f"{field}.role", misplaced)
        previous = message


def _message_problems(message: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(field, problem) of one message, seen alone."""
    assistant = message["role"] == "assistant"
    content, reasoning, calls = (message.get(key) for key in ("content", "reasoning_content", "tool_calls"))
    if "content" not in message and not (assistant and (calls or reasoning)):
        yield "content", "is missing; it must be a string, or null for empty"
    elif not isinstance(content, str | None):
        yield "content", f"is {_name(content)}; it must be a string, or null for empty"
    if not isinstance(reasoning, str | None):
        yield "reasoning_content", f"is {_name(reasoning)}; it must be a string or absent"
    elif reasoning and not assistant:
        yield "reasoning_content", f"stands on a {message['role']} turn; only assistant turns reason: remove it"
    elif reasoning and isinstance(content, str) and content.lstrip().startswith("<think>"):
        yield "reasoning_content", "is given and content begins with <think> too; give the reasoning once"
    loss = message.get("loss")
    if not isinstance(loss, bool | None):
        yield "loss", f"is {loss!r}; it must be true, false or absent (absent: assistant turns are trained on)"
    elif loss and not assistant:
        yield "loss", f"is true on a {message['role']} turn; only assistant turns are trained on: remove it"
    if not calls and isinstance(calls, list | None):
        return
    if not assistant:
        yield "tool_calls", f"stands on a {message['role']} turn; only assistant turns call tools: remove it"
    elif not isinstance(calls, list):
        yield "tool_calls", f"is {_name(calls)}; it must be a list of {{type, function: {{name, arguments}}}}"
    else:
        for index, call in enumerate(calls):
            function = call.get("function") if isinstance(call, dict) else None
            if not isinstance(function, dict):
                yield f"tool_calls[{index}].function", f"is {_name(function)}; it must be an object with 'name'"
                continue
            if not isinstance(function.get("name"), str):
                found = _name(function.get("name"))
                yield f"tool_calls[{index}].function.name", f"is {found}; it must be a string"
            if not isinstance(function.get("arguments"), str):
                found = _name(function.get("arguments"))
                yield (
                    f"tool_calls[{index}].function.arguments",
                    f'is {found}; it must be a string: give the arguments as JSON text, \'{{"city": "Rome"}}\'',
                )


def _order_problem(previous: dict[str, Any] | None, message: dict[str, Any]) -> str | None:
    """Why `message` cannot follow `previous`; None where it can."""
    role, before = message["role"], previous["role"] if previous else None
    if role == "system" and before not in (None, "system"):
        return f"is 'system' after a {before} turn; system turns come first: move it to the front"
    if role == "tool" and not (before == "tool" or (previous and before == "assistant" and previous.get("tool_calls"))):
        return "is 'tool', but no assistant turn with tool_calls stands before it"
    if role == "user" and before == "tool":
        return "is 'user' right after a tool's output; an assistant turn that answers it must stand between"
    if role == "assistant" and before == "assistant":
        return "is 'assistant' right after another assistant turn; merge the two or put the user's turn between them"
    return None


def _name(value: Any) -> str:
    names = {type(None): "null", dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return names.get(type(value), f"{value!r}")


# JSON Lines ----------------------------------------------------------------------------------------------------------


def _scan_lines(path: str) -> FileScan:
    digest, spans = hashlib.sha256(), []
    start = offset = 0
    row = first = 1
    with open(path, "rb") as file:
        for line in file:
            digest.update(line)
            offset += len(line)
            row += 1
            if row - first == ROWS_PER_SPAN or offset - start >= BYTES_PER_SPAN:
                spans.append(Span(path, "jsonl", first, start, offset))
                start, first = offset, row
    if offset > start:
        spans.append(Span(path, "jsonl", first, start, offset))
    return FileScan(path, digest.hexdigest(), tuple(spans))


def _read_lines(span: Span) -> Iterator[tuple[int, Any]]:
    with open(span.path, "rb") as file:
        file.seek(span.start)
        row, position = span.first_row, span.start
        while position < span.stop:
            line = file.readline()
            position += len(line)
            text = line.removeprefix(_BOM).strip()
            if text:
                yield row, _parse(text, f"{span.path}:{row}")
            row += 1


def _parse(text: bytes, source: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        return RowError(source, "", f"is not one valid JSON object on one line ({error}); repair or remove the line")


# JSON arrays ---------------------------------------------------------------------------------------------------------


def _scan_array(path: str) -> FileScan:
    data = Path(path).read_bytes()
    text = data.decode("utf-8", errors="surrogateescape")  # invalid bytes keep their place; the reader reports them
    position = text.index("[") + 1
    offset = start = _byte_length(text[:position])  # `position` in bytes
    spans: list[Span] = []
    row = first = 1
    try:
        for _, end in _elements(text, position):
            offset += _byte_length(text[position:end])
            position = end
            row += 1
            if row - first == ROWS_PER_SPAN or offset - start >= BYTES_PER_SPAN:
                spans.append(Span(path, "json", first, start, offset))
                start, first = offset, row
    except json.JSONDecodeError:
        pass  # the reader of the last span meets it again and names the row
    spans.append(Span(path, "json", first, start, len(data)))
    return FileScan(path, hashlib.sha256(data).hexdigest(), tuple(spans))


def _byte_length(text: str) -> int:
    return len(text.encode("utf-8", errors="surrogateescape"))


def _elements(text: str, position: int) -> Iterator[tuple[Any, int]]:
    """(value, position behind it) of an array's elements from `position` to its `]` or to the end of the text."""
    while True:
        while position < len(text) and text[position] in _WHITESPACE + ",":
            position += 1
        if position == len(text) or text[position] == "]":
            return
        value, position = _DECODER.raw_decode(text, position)
        yield value, position


def _read_array(span: Span) -> Iterator[tuple[int, Any]]:
    with open(span.path, "rb") as file:
        file.seek(span.start)
        data = file.read(span.stop - span.start)
    row = span.first_row
    try:
        for value, _ in _elements(data.decode("utf-8"), 0):
            yield row, value
            row += 1
    except ValueError as error:
        problem = f"is not valid JSON ({error}); nothing behind it can be read: repair the file"
        yield row, RowError(f"{span.path}:{row}", "", problem)


# Parquet -------------------------------------------------------------------------------------------------------------


def _scan_parquet(path: str) -> FileScan:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        metadata = pq.read_metadata(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file ({error}); write it again or remove it") from None
    spans, first = [], 1
    for group in range(metadata.num_row_groups):
        spans.append(Span(path, "parquet", first, group, group + 1))
        first += metadata.row_group(group).num_rows
    return FileScan(path, digest, tuple(spans))


def _read_parquet(span: Span) -> Iterator[tuple[int, Any]]:
    with pq.ParquetFile(span.path, memory_map=True) as file:
        # Other columns are never looked at; without 'messages' the rows are read whole, for the error to list them.
        names = file.schema_arrow.names
        columns = [name for name in ("messages", "tools") if name in names] if "messages" in names else None
        row = span.first_row
        for batch in file.iter_batches(batch_size=128, row_groups=[span.start], columns=columns):
            for value in batch.to_pylist():
                yield row, value
                row += 1
