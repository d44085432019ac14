"""Rows of JSON, JSON Lines and Parquet files, plain or compressed by gzip or zstd: where they are, and the rows.

A file is first scanned (`scan`) into spans of rows that processes read independently and in order, then read span by
span (`read_span`) in constant memory. What a file is, its bytes say; of its name only `.parquet` counts.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from .elements import elements
from .files import STREAM_ERRORS, is_compressed, open_bytes
from .rows import RowError

# A span ends at whichever comes first: small enough for processes to share the work.
ROWS_PER_SPAN = 1024
BYTES_PER_SPAN = 8 << 20
# Of a compressed file, which is decompressed from its start for each span: 5 % of the time that tokenising takes.
COMPRESSED_SPANS = 64

_BOM = b"\xef\xbb\xbf"
_SPACE = " \t\r\n"
_HEAD = 512
_PARQUET = b"PAR1"
_CONVERT = "convert it to JSONL or Parquet"
_OTHER_FILES = (
    (b"\xff\xfe", "is UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "is UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the data; fetch it: git lfs pull"),
    (b"ARROW1", f"is an Arrow file; {_CONVERT}"),
    (b"\xff\xff\xff\xff", f"is an Arrow stream; {_CONVERT}"),
    (b"Obj\x01", f"is an Avro file; {_CONVERT}"),
    (b"\x89HDF", f"is an HDF5 file; {_CONVERT}"),
    (b"SQLite format 3\0", f"is an SQLite database; {_CONVERT}"),
    (b"PARE", "is an encrypted Parquet file; decrypt it"),
    (b"PK\x03\x04", "is a zip archive; unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive; unpack it"),
    (b"BZh", "is compressed by bzip2; unpack it, or compress it by gzip or zstd"),
    (b"\xfd7zXZ\0", "is compressed by xz; unpack it, or compress it by gzip or zstd"),
    (b"\x04\x22\x4d\x18", "is compressed by lz4; unpack it, or compress it by gzip or zstd"),
    (b"\x1f\x8b", "is compressed twice; unpack it once"),
    (b"\x28\xb5\x2f\xfd", "is compressed twice; unpack it once"),
)

Kind = Literal["lines", "array", "values", "parquet"]


@dataclass(frozen=True)
class Span:
    """Rows [first_row, stop_row) of one file, counted from 1; in JSON Lines they are the numbers of the lines.

    `start`: the byte of its (decompressed) text at which the first row begins, in lines, in an array or as a value
    outside any; or the Parquet row group that the span is.
    """

    path: str
    kind: Kind
    first_row: int
    stop_row: int
    start: int


@dataclass(frozen=True)
class FileScan:
    """What one pass over a file finds: the spans that cover its rows, as far as they can be told apart, and what is
    wrong with the file as a whole, for people. A sound file has rows."""

    path: str
    spans: tuple[Span, ...]
    problem: str | None = None


def scan(path: str) -> FileScan:
    """Spans of a file, found in constant memory; a cut or damaged file has those of the rows before."""
    try:
        with open_bytes(path) as file:
            head = file.read(_HEAD)
        if head.startswith(_PARQUET) or path.lower().endswith(".parquet"):
            return _scan_parquet(path, head)
        problem = _refused(head)
        return FileScan(path, (), f"{path} {problem}") if problem else _scan_text(path, head)
    except STREAM_ERRORS as error:
        return FileScan(path, (), f"{path} cannot be read ({error}); write it again or leave it out")


def read_span(span: Span) -> Iterator[tuple[int, Any]]:
    """Yields (row number from 1, the parsed row, or a `RowError` where it cannot be parsed)."""
    if span.kind == "parquet":
        yield from _read_parquet(span)
        return
    with open_bytes(span.path, span.start) as file:
        for _, row, _, text in _texts(file, span.kind, span.first_row, span.start):
            if row >= span.stop_row:  # a blank line stood at the span's end
                return
            yield row, _parse(text, f"{span.path}:{row}", span.kind)
            if row + 1 == span.stop_row:  # what is behind it may be no JSON
                return


def _refused(head: bytes) -> str | None:
    for magic, problem in _OTHER_FILES:
        if head.startswith(magic):
            return problem
    if head[257:262] == b"ustar":
        return "is a tar archive; unpack it"
    if b"\0" in head[:4]:
        return "is no UTF-8 text; convert it: iconv -f UTF-16 -t UTF-8, say"
    return None


# JSON text -----------------------------------------------------------------------------------------------------------


def _scan_text(path: str, head: bytes) -> FileScan:
    kind: Kind = "values" if head.removeprefix(_BOM).lstrip().startswith(b"[") else "lines"
    spans: list[Span] = []
    first: tuple[Kind, int, int] | None = None
    row, problem = 0, None
    with open_bytes(path) as file:
        try:
            for state, row, start, _ in _texts(file, kind, 1, 0):
                if first is not None and (row - first[1] >= ROWS_PER_SPAN or start - first[2] >= BYTES_PER_SPAN):
                    spans.append(Span(path, first[0], first[1], row, first[2]))
                    first = None
                first = first or (state, row, start)
        except (ValueError, *STREAM_ERRORS) as error:
            problem = f"{path}:{row + 1}: {error}; what is there and behind it cannot be read: repair the file"
    if first is not None:
        spans.append(Span(path, first[0], first[1], row + 1, first[2]))
    elif problem is None:
        problem = f"{path} has no rows; leave it out"
    return FileScan(path, tuple(_joined(spans) if is_compressed(path) else spans), problem)


def _joined(spans: list[Span]) -> list[Span]:
    """Neighbours together, so that there are `COMPRESSED_SPANS` at most."""
    size = -(-len(spans) // COMPRESSED_SPANS) or 1
    groups = [spans[start : start + size] for start in range(0, len(spans), size)]
    return [replace(group[0], stop_row=group[-1].stop_row) for group in groups]


def _texts(file: BinaryIO, kind: Kind, row: int, offset: int) -> Iterator[tuple[Kind, int, int, bytes]]:
    """Yields (kind, row number, first byte, text) of the rows of a file that reads on from byte `offset`, at a row."""
    if kind == "lines":
        for number, line in enumerate(file, row):
            if line.removeprefix(_BOM).strip():
                yield kind, number, offset, line
            offset += len(line)
    elif kind != "parquet":
        for number, (state, start, text) in enumerate(elements(file, kind, offset), row):
            yield state, number, start, text


def _parse(text: bytes, source: str, kind: Kind) -> Any:
    try:
        return _DECODER.decode(text.removeprefix(_BOM).decode("utf-8").strip(_SPACE))
    except RecursionError:
        problem = "it is nested too deep"
    except json.JSONDecodeError as error:
        problem = f"{error.msg}: character {error.pos + 1}"
    except ValueError as error:
        problem = str(error)
    what = ("one valid JSON object on one line", "line") if kind == "lines" else ("valid JSON", "row")
    return RowError(source, "", f"is not {what[0]} ({problem}); repair or remove the {what[1]}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"an object has the key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return fields


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_number)


# Parquet -------------------------------------------------------------------------------------------------------------


def _scan_parquet(path: str, head: bytes) -> FileScan:
    if is_compressed(path):
        return FileScan(path, (), f"{path} is a compressed Parquet file; unpack it, Parquet compresses its columns")
    try:
        metadata = pq.read_metadata(path)
        names = metadata.schema.to_arrow_schema().names
    except (pa.ArrowException, OSError) as error:
        what = "is damaged or cut" if head.startswith(_PARQUET) else "is not a Parquet file"
        return FileScan(path, (), f"{path} {what} ({error}); write it again or leave it out")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        return FileScan(path, (), f"{path} has two columns {twice!r}; rename one")
    spans, first = [], 1
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        spans.append(Span(path, "parquet", first, first + rows, group))
        first += rows
    return FileScan(path, tuple(spans), None if first > 1 else f"{path} has no rows; leave it out")


def _read_parquet(span: Span) -> Iterator[tuple[int, Any]]:
    row = span.first_row
    try:
        with pq.ParquetFile(span.path, memory_map=True) as file:
            # Numbers and bytes beside the messages are nobody's business and may be large.
            columns = [field.name for field in file.schema_arrow if _has_text(field.type)] or None
            for batch in file.iter_batches(batch_size=128, row_groups=[span.start], columns=columns):
                for value in _values(batch):
                    if isinstance(value, Exception):
                        value = RowError(
                            f"{span.path}:{row}", "", f"cannot be read ({value}); repair or remove the row"
                        )
                    yield row, value
                    row += 1
    except (pa.ArrowException, OSError) as error:
        problem = f"cannot be read, and nothing behind it in row group {span.start} ({error}); write the file again"
        yield row, RowError(f"{span.path}:{row}", "", problem)


def _values(batch: pa.RecordBatch) -> Iterator[Any]:
    """The rows as Python has them; the exception where one has no place there (text that is not UTF-8)."""
    try:
        rows = batch.to_pylist()
    except ValueError:
        rows = []
        for index in range(len(batch)):
            try:
                rows += batch.slice(index, 1).to_pylist()
            except ValueError as error:
                rows.append(error)
    for row in rows:
        yield row if isinstance(row, Exception) else {name: _as_written(value) for name, value in row.items()}


def _as_written(value: Any) -> Any:
    """A column's value without the nulls that Parquet fills into every object that lacks a field of another one; of
    turns only inside their fields, since a turn's own null is as good as none."""
    if isinstance(value, list) and value and isinstance(value[0], dict) and value[0].keys() & {"role", "from"}:
        return [turn and {key: _without_nulls(field) for key, field in turn.items()} for turn in value]
    return _without_nulls(value)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(field) for key, field in value.items() if field is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _has_text(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(_has_text(field.type) for field in kind)
    if pa.types.is_map(kind):
        return _has_text(kind.key_type) or _has_text(kind.item_type)
    if hasattr(kind, "value_type"):  # lists of every sort, dictionaries
        return _has_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
