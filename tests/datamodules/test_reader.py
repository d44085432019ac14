import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from src.datamodules import reader
from src.datamodules.reader import RowError, expand, read_span, row_errors, scan

ROWS = [{"messages": [{"role": "user", "content": f"第{i}问\n?"}], "id": i} for i in range(7)]
USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


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


@pytest.mark.parametrize("rows_per_span", [1, 2, 1024])
def test_a_broken_array_gives_its_good_rows_then_one_error(
    rows_per_span: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "ROWS_PER_SPAN", rows_per_span)
    path = tmp_path / "data.json"
    path.write_text('[{"a": "é"}, {"a": 2}, {"a": ]')
    *good, (number, error) = read(path)
    assert good == [(1, {"a": "é"}), (2, {"a": 2})]
    assert number == 3 and f"{path}:3: is not valid JSON" in str(error)


def test_a_digest_is_of_the_bytes(tmp_path: Path) -> None:
    for kind in ("jsonl", "json", "parquet"):
        first, second = write_as(kind, tmp_path / f"a.{kind}"), write_as(kind, tmp_path / f"b.{kind}")
        assert scan(str(first)).digest == scan(str(second)).digest
        second.write_bytes(second.read_bytes().replace(b"?", b"!") if kind != "parquet" else first.read_bytes())
        assert (scan(str(first)).digest == scan(str(second)).digest) == (kind == "parquet")


def test_files_are_sorted_within_a_pattern_and_taken_once(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).touch()
    (tmp_path / "d.jsonl").mkdir()
    found = expand([str(tmp_path / "c.txt"), str(tmp_path / "*.jsonl"), str(tmp_path / "a.*")])
    assert [Path(path).name for path in found] == ["c.txt", "a.jsonl", "b.jsonl"]
    with pytest.raises(ValueError, match=r"no file matches 'nowhere/\*\.jsonl'.*give an existing"):
        expand(["nowhere/*.jsonl"])


def test_not_parquet(tmp_path: Path) -> None:
    (tmp_path / "data.parquet").write_text("{}")
    with pytest.raises(ValueError, match=r"data\.parquet is not a Parquet file"):
        scan(str(tmp_path / "data.parquet"))


CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
GOOD = [
    [USER, ANSWER],
    [{"role": "system", "content": "s"}, {"role": "system", "content": "t"}, USER, ANSWER | {"loss": False}],
    [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "1"}, ANSWER],
    [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": None}, ANSWER],
    [USER | {"reasoning_content": None, "tool_calls": [], "loss": None}, ANSWER | {"reasoning_content": "r"}],
    [USER, USER, ANSWER, USER],
]


@pytest.mark.parametrize("messages", GOOD)
def test_valid_rows(messages: list[dict[str, Any]]) -> None:
    assert [str(error) for error in row_errors({"messages": messages}, "f:1")] == []


def assistant(**fields: Any) -> dict[str, Any]:
    return {"messages": [USER, ANSWER | fields]}


def calling(function: Any) -> dict[str, Any]:
    return assistant(tool_calls=[{"function": function}])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("text", r"f:9: is a string; a row must be an object"),
        ({"conversations": []}, r"f:9: messages: is missing \(fields: conversations\)"),
        ({"messages": "hi"}, r"messages: is a string; it must be a list"),
        ({"messages": []}, r"messages: is empty"),
        ({"messages": ["hi"]}, r"messages\[0\]: is a string; it must be an object"),
        (
            {"messages": [{"role": "human", "content": "q"}]},
            r"messages\[0\]\.role: is 'human'; it must be one of system",
        ),
        ({"messages": [{"content": "q"}]}, r"messages\[0\]\.role: is None"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]\.content: is missing"),
        ({"messages": [{"role": "user", "content": [1]}]}, r"messages\[0\]\.content: is a list; it must be a string"),
        (assistant(reasoning_content=3), r"messages\[1\]\.reasoning_content: is 3; it must be a string"),
        (assistant(reasoning_content="r", content="<think>\nr\n</think>\n\na"), r"give the reasoning once"),
        (
            {"messages": [USER | {"reasoning_content": "r"}, ANSWER]},
            r"messages\[0\]\.reasoning_content: stands on a user",
        ),
        (assistant(loss=1), r"messages\[1\]\.loss: is 1; it must be true, false or absent"),
        ({"messages": [USER | {"loss": True}, ANSWER]}, r"messages\[0\]\.loss: is true on a user turn"),
        ({"messages": [USER | {"tool_calls": [CALL]}, ANSWER]}, r"messages\[0\]\.tool_calls: stands on a user turn"),
        (assistant(tool_calls={"a": 1}), r"messages\[1\]\.tool_calls: is an object; it must be a list"),
        (assistant(tool_calls=["f"]), r"messages\[1\]\.tool_calls\[0\]\.function: is null"),
        (calling({"arguments": "{}"}), r"tool_calls\[0\]\.function\.name: is null; it must be a string"),
        (calling({"name": "f", "arguments": {"q": 1}}), r"function\.arguments: is an object; .*as JSON text"),
        (
            {"messages": [USER, {"role": "system", "content": "s"}]},
            r"messages\[1\]\.role: is 'system' after a user turn",
        ),
        (
            {"messages": [USER, {"role": "tool", "content": "s"}]},
            r"messages\[1\]\.role: is 'tool', but no assistant turn",
        ),
        ({"messages": [USER, ANSWER, ANSWER]}, r"messages\[2\]\.role: is 'assistant' right after another assistant"),
        (
            {"messages": [USER, ANSWER | {"tool_calls": [CALL]}, {"role": "tool", "content": "1"}, USER]},
            r"messages\[3\]\.role: is 'user' right after a tool's output",
        ),
    ],
)
def test_a_malformed_row_names_file_row_and_field(row: Any, message: str) -> None:
    (error,) = row_errors(row, "f:9")
    assert str(error).startswith("f:9: ")
    with pytest.raises(ValueError, match=message):
        raise error


def test_all_errors_of_a_row_can_be_collected() -> None:
    row = {"messages": [USER | {"loss": True, "content": 1}, ANSWER | {"loss": "no"}, ANSWER]}
    assert [error.field for error in row_errors(row, "f:1")] == [
        "messages[0].content",
        "messages[0].loss",
        "messages[1].loss",
        "messages[2].role",
    ]
