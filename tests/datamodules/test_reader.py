import bz2
import gzip
import json
import lzma
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from src.datamodules import elements, reader
from src.datamodules.reader import read_span, scan
from src.datamodules.rows import RowError

ROWS = [{"messages": [{"role": "user", "content": f"第{i}问\n?"}], "id": i} for i in range(7)]


def read(path: Path | str) -> list[tuple[int, Any]]:
    return [item for span in scan(str(path)).spans for item in read_span(span)]


def write_as(kind: str, path: Path) -> Path:
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=3)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    else:
        path.write_text(json.dumps(ROWS, ensure_ascii=False, indent=1), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("rows_per_span", [1, 3, 1024])
def test_every_format_gives_the_same_rows_however_it_is_cut(
    kind: str, rows_per_span: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "ROWS_PER_SPAN", rows_per_span)
    path = write_as(kind, tmp_path / f"data.{kind}")
    assert [(number, row["messages"]) for number, row in read(path)] == [
        (number, row["messages"]) for number, row in enumerate(ROWS, 1)
    ]
    if kind != "parquet":
        assert len(scan(str(path)).spans) >= len(ROWS) // rows_per_span
    for span in scan(str(path)).spans:
        assert next(read_span(span), (span.first_row,))[0] == span.first_row


def test_json_lines_number_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "data.json"  # named .json, as many are
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": \xff}\n{"a": 2')
    (first, row), (fourth, bad), (fifth, cut) = read(path)
    assert (first, row, fourth, fifth) == (1, {"a": 1}, 4, 5)
    assert isinstance(bad, RowError) and isinstance(cut, RowError)
    assert str(cut).startswith(f"{path}:5: is not one valid JSON object on one line")


def sound(rows: int) -> list[dict[str, Any]]:
    return [{"n": row, "text": 'é\u2028"]},[{\\'} for row in range(1, rows + 1)]


def dump(*rows: Any) -> str:
    return json.dumps(rows, ensure_ascii=False)


ONE, TWO, THREE = (json.dumps(row, ensure_ascii=False) for row in sound(3))


@pytest.mark.parametrize("rows_per_span", [1, 2, 1024])
@pytest.mark.parametrize("block", [3, 1 << 20])
@pytest.mark.parametrize(
    "text",
    [
        f"[{ONE},{TWO}]\n[{THREE}]",
        f"[{ONE}][{TWO},{THREE}]",
        f"[{ONE}]\n{TWO}\n{THREE}\n",
        f"[]\n\n[{ONE}\n,\r\n{TWO}\t, {THREE}]  ",
        f"\ufeff[{ONE}]\n\ufeff[{TWO}]\ufeff{THREE}",
    ],
)
def test_all_values_of_arrays_and_behind_them_are_rows(
    text: str, block: int, rows_per_span: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "ROWS_PER_SPAN", rows_per_span)
    monkeypatch.setattr(elements, "_BLOCK", block)
    path = tmp_path / "data.json"
    path.write_text(text, encoding="utf-8")
    assert read(path) == list(enumerate(sound(3), 1)) and scan(str(path)).problem is None


@pytest.mark.parametrize("rows_per_span", [1, 2, 1024])
@pytest.mark.parametrize("block", [3, 1 << 20])
@pytest.mark.parametrize(
    ("text", "row", "problem"),
    [
        (f"[{ONE},\n{TWO},\n", 3, "the file ends inside an array"),
        (f"[{ONE}, {TWO}", 3, "the file ends inside an array"),
        (f"[{ONE}, {TWO[:-1]}", 2, "the file ends inside a value"),
        (f"[{ONE}, {TWO[:9]}", 2, "the file ends inside a value"),
        (f'[{ONE}, {TWO}] {{"messages": [', 3, "the file ends inside a value"),
        (f"[{ONE}, {TWO}] [", 3, "the file ends inside an array"),
        (f"[{ONE} {TWO}, {THREE}]", 2, "a comma or ']' is missing"),
        (f"[{ONE}, , {TWO}]", 2, "',' found where a value is expected"),
        (f"[{ONE}, {TWO},]", 3, "']' found where a value is expected"),
        (f"[{ONE}, {TWO}]]", 3, "']' found where a value is expected"),
        (f"[{ONE}, {TWO}], {THREE}", 3, "',' found where a value is expected"),
        ("[", 1, "the file ends inside an array"),
    ],
)
def test_an_array_that_does_not_end_where_the_file_ends_is_refused_with_its_place(
    text: str, row: int, problem: str, block: int, rows_per_span: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "ROWS_PER_SPAN", rows_per_span)
    monkeypatch.setattr(elements, "_BLOCK", block)
    path = tmp_path / "data.json"
    path.write_text(text, encoding="utf-8")
    assert scan(str(path)).problem == (
        f"{path}:{row}: {problem}; what is there and behind it cannot be read: repair the file"
    )
    assert read(path) == list(enumerate(sound(row - 1), 1))  # the rows before are still looked at


@pytest.mark.parametrize("kind", ["jsonl", "json"])
@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (b'{"a": 1, "a": 2}', "an object has the key 'a' twice"),
        (b'{"a": [{"b": 1, "b": 1}]}', "an object has the key 'b' twice"),
        (b'{"a": NaN}', "NaN is no JSON"),
        (b'{"a": -Infinity}', "-Infinity is no JSON"),
        (b'{"a": "\xff"}', "'utf-8' codec can't decode byte 0xff"),
        (b'{"a": "\xed\xa0\xbd"}', "'utf-8' codec can't decode byte 0xed"),  # half a character, as CESU-8 has it
        (b'{"a": "b" "c": 1}', "Expecting ',' delimiter: character 11"),
        (b"{'a': 1}", "Expecting property name"),
        (b'{"a": 1,}', "character"),
        (b'{"a": "\x01"}', "Invalid control character"),
        (b'{"a": "\\x"}', "Invalid \\escape"),
        (b'{"a": 01}', "Expecting ',' delimiter"),
        (b'{"a": tru}', "Expecting value"),
        (b'{"a": [1}]', "Expecting ',' delimiter"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "it is nested too deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "4300 digits"),
        (b"hello", "Expecting value"),
    ],
)
def test_a_row_that_is_no_json_is_one_error(kind: str, row: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    path.write_bytes(b'[{"n": 1},' + row + b',{"n": 3}]' if kind == "json" else b'{"n": 1}\n' + row + b'\n{"n": 3}')
    first, (number, error), third = read(path)
    assert (first, number, third) == ((1, {"n": 1}), 2, (3, {"n": 3})) and isinstance(error, RowError)
    assert str(error).startswith(f"{path}:2: is not ") and problem in str(error)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_a_file_without_rows_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.table({"messages": pa.array([], pa.string())}), path)
    for content in [path.read_bytes()] if path.exists() else [b"", b"\n \r\n", b"[]", b" [\n] []\n", b"\xef\xbb\xbf"]:
        path.write_bytes(content)
        assert scan(str(path)).problem == f"{path} has no rows; leave it out"
        assert read(path) == []


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"a": 1}\n'.encode("utf-16"), "is UTF-16 text"),
        ('{"a": 1}\n'.encode("utf-16-le"), "is no UTF-8 text"),
        ('[{"a": 1}]'.encode("utf-32-be"), "is no UTF-8 text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a Git LFS pointer"),
        (b"PK\x03\x04", "is a zip archive"),
        (bz2.compress(b"{}"), "is compressed by bzip2"),
        (lzma.compress(b"{}"), "is compressed by xz"),
        (gzip.compress(gzip.compress(b"{}")), "is compressed twice"),
        (gzip.compress(b"PAR1 and more"), "is a compressed Parquet file"),
        (b"PAR1 and no more", "is damaged or cut"),
        (b"x" * 257 + b"ustar", "is a tar archive"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # gzip writes the time: no name for a test
)
def test_other_files_are_refused_by_what_they_are(content: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    found = scan(str(path))
    assert found.problem is not None and found.problem.startswith(f"{path} {problem}") and not found.spans


@pytest.mark.parametrize("kind", ["jsonl", "json"])
@pytest.mark.parametrize("packed", ["gzip", "zstd"])
def test_compressed_files_give_the_same_rows(
    packed: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever they are named, in two pieces joined by cat, and in few spans."""
    monkeypatch.setattr(reader, "ROWS_PER_SPAN", 1)
    monkeypatch.setattr(reader, "COMPRESSED_SPANS", 3)
    text = write_as(kind, tmp_path / "plain").read_bytes()
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(pack(piece, packed) for piece in (text[:100], text[100:])))
    assert read(path) == read(tmp_path / "plain") and len(scan(str(path)).spans) == 3


@pytest.mark.parametrize("packed", ["gzip", "zstd"])
def test_a_compressed_file_that_is_cut_is_refused_with_its_place(packed: str, tmp_path: Path) -> None:
    lines = [json.dumps({"n": row, "text": os.urandom(300).hex()}) + "\n" for row in range(2000)]
    path = tmp_path / "a.jsonl"
    whole = pack("".join(lines).encode(), packed)
    for content in (whole[: len(whole) // 2], whole[:-1], whole + b"more"):
        path.write_bytes(content)
        found = scan(str(path))
        rows = read(path)
        assert found.problem is not None and found.problem.startswith(f"{path}:{len(rows) + 1}: ")
        assert rows == [(number, json.loads(line)) for number, line in enumerate(lines[: len(rows)], 1)]
    path.write_bytes(whole[:5])
    assert str(scan(str(path)).problem).startswith(f"{path} cannot be read")


def pack(content: bytes, packed: str) -> bytes:
    if packed == "gzip":
        return gzip.compress(content)
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, packed) as stream:
        stream.write(content)
    return bytes(sink.getvalue())


def test_parquet_by_its_bytes_and_not_by_another_name(tmp_path: Path) -> None:
    (tmp_path / "data.parquet").write_text("{}")
    assert "data.parquet is not a Parquet file" in str(scan(str(tmp_path / "data.parquet")).problem)
    assert len(read(write_as("parquet", tmp_path / "rows.bin"))) == len(ROWS)


def test_parquet_has_no_nulls_where_rows_have_nothing(tmp_path: Path) -> None:
    """A column of objects has the fields of all of them; the tools of one row are not those of another."""
    tools = [[{"function": {"name": "f", "parameters": {name: {"type": "string"}}}}] for name in ("city", "day")]
    turns: list[dict[str, Any]] = [{"role": "user", "content": None}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": turns, "tools": each} for each in tools]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [(1, rows[0]), (2, rows[1])]


def test_parquet_text_that_is_not_utf8_is_an_error_of_its_row(tmp_path: Path) -> None:
    binary = pa.array([b"a", b"\xff", b"c"])
    column = pa.Array.from_buffers(pa.string(), 3, binary.buffers())
    pq.write_table(pa.table({"messages": column, "scores": [1, 2, 3], "bytes": binary}), tmp_path / "a.parquet")
    first, (number, error), third = read(tmp_path / "a.parquet")
    assert (first, number, third) == ((1, {"messages": "a"}), 2, (3, {"messages": "c"}))
    assert isinstance(error, RowError) and "can't decode byte 0xff" in str(error)


def test_a_damaged_parquet_file_is_an_error_of_its_row(tmp_path: Path) -> None:
    path = write_as("parquet", tmp_path / "a.parquet")
    content = bytearray(path.read_bytes())
    content[4:80] = bytes(76)
    path.write_bytes(content)
    found = read(path)
    assert found[0][0] == 1 and isinstance(found[0][1], RowError) and "row group 0" in str(found[0][1])
    assert [number for number, _ in found[1:]] == [4, 5, 6, 7]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    column = pa.array(["a"])
    pq.write_table(pa.Table.from_arrays([column, column], ["a", "a"]), tmp_path / "a.parquet")
    assert "has two columns 'a'" in str(scan(str(tmp_path / "a.parquet")).problem)
