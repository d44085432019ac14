from typing import Any

import pytest

from src.datamodules.rows import row_errors

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
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
            r"messages\[0\]\.reasoning_content: is on a user",
        ),
        (assistant(loss=1), r"messages\[1\]\.loss: is 1; it must be true, false or absent"),
        ({"messages": [USER | {"loss": True}, ANSWER]}, r"messages\[0\]\.loss: is true on a user turn"),
        ({"messages": [USER | {"tool_calls": [CALL]}, ANSWER]}, r"messages\[0\]\.tool_calls: is on a user turn"),
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
