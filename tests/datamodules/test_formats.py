import json
from typing import Any

import pytest

from src.datamodules.formats import Conversation, Format, check_fields, read_row

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def read(row: Any, format: Any = "auto", **fields: Any) -> Conversation:
    return read_row(row, "f:9", fields, format, lambda role, field: (role, field) == ("user", "read"))


def sound(row: Any, format: Any = "auto", **fields: Any) -> list[Any]:
    found = read(row, format, **fields)
    assert [str(error) for error in found.errors] == []
    return found.messages


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [USER, ANSWER]}, [USER, ANSWER]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [USER, ANSWER]),
        ({"conversations": [USER, {"from": "assistant", "value": "a"}]}, [USER, ANSWER]),
        (
            {"conversations": [{"from": "system", "value": "s"}, {"from": "user", "value": "q", "role": None}, ANSWER]},
            [SYSTEM, USER, ANSWER],
        ),
        ({"conversations": [USER, {"from": "chatgpt", "value": "a", "loss": False}]}, [USER, ANSWER | {"loss": False}]),
        ({"instruction": "q", "output": "a"}, [USER, ANSWER]),
        ({"instruction": "q", "input": "", "output": "a", "history": None}, [USER, ANSWER]),
        ({"instruction": "q", "input": "more", "output": "a"}, [USER | {"content": "q\nmore"}, ANSWER]),
        (
            {"instruction": "q", "output": "a", "history": [["1", "2"]], "reasoning_content": "r", "system": "s"},
            [
                SYSTEM,
                {"role": "user", "content": "1"},
                {"role": "assistant", "content": "2"},
                USER,
                ANSWER | {"reasoning_content": "r"},
            ],
        ),
    ],
)
def test_each_format_gives_the_same_messages(row: dict[str, Any], messages: list[Any]) -> None:
    assert sound(row) == messages
    (format,) = {"messages", "conversations", "instruction"} & row.keys()
    names: dict[str, Format] = {"messages": "messages", "conversations": "sharegpt", "instruction": "alpaca"}
    assert sound(row, names[format]) == messages and read(row).format == names[format]


@pytest.mark.parametrize(
    ("row", "format", "message"),
    [
        ("text", "auto", r"^f:9: is a string; a row must be an object"),
        (["list"], "auto", r"^f:9: is a list; a row must be an object"),
        ({"rows": []}, "auto", r"messages: is missing \(fields: rows\); .*messages, or conversations \(ShareGPT\), or"),
        ({"messages": None, "x": 1}, "auto", r"messages: is null; a row must have"),
        (
            {"conversations": []},
            "messages",
            r"messages: is missing \(fields: conversations\); a row must have messages",
        ),
        ({"messages": [USER, ANSWER]}, "sharegpt", r"conversations: is missing"),
        ({"instruction": "q"}, "alpaca", r"instruction: is missing|must have instruction and output"),
        (
            {"messages": [USER, ANSWER], "conversations": []},
            "auto",
            r"has messages and conversations; name the one to read: --data.format messages or sharegpt",
        ),
        (
            {"messages": [USER, ANSWER], "instruction": "q", "output": "a"},
            "auto",
            r"has messages and instruction; name the one to read: --data.format messages or alpaca",
        ),
        ({"messages": "hi"}, "auto", r"messages: is a string; it must be a list"),
        ({"conversations": {}}, "auto", r"conversations: is an object; it must be a list"),
        (
            {"conversations": [{"from": "bot", "value": "q"}]},
            "auto",
            r"conversations\[0\]\.from: is 'bot'; it must be one of human, user, gpt",
        ),
        ({"conversations": [{"from": ["human"], "value": "q"}]}, "auto", r"conversations\[0\]\.from: is \['human'\]"),
        (
            {"conversations": [{"from": "human", "value": "q", "content": "p"}]},
            "auto",
            r"conversations\[0\]\.value: is given beside content",
        ),
        ({"conversations": ["hi"]}, "auto", r"messages\[0\]: is a string; it must be an object"),
        ({"instruction": 1, "output": "a"}, "auto", r"instruction: is 1; it must be a string"),
        ({"instruction": "q", "input": [], "output": "a"}, "auto", r"input: is a list; it must be a string"),
        ({"instruction": "q", "output": {}}, "auto", r"output: is an object; it must be a string"),
        (
            {"instruction": "q", "output": "a", "history": [["1"]]},
            "auto",
            r"history: is a list; it must be a list of \[q",
        ),
        ({"instruction": "q", "output": "a", "history": "1"}, "auto", r"history: is a string"),
        ({"messages": [USER, ANSWER], "system": ["s"]}, "auto", r"system: is a list; it must be a string"),
        (
            {"messages": [SYSTEM, USER, ANSWER], "system": "t"},
            "auto",
            r"system: is given beside .* another system turn",
        ),
        ({"messages": [USER, ANSWER], "tools": {"a": 1}}, "auto", r"tools: is an object; it must be a list of objects"),
        ({"messages": [USER, ANSWER], "tools": ["f"]}, "auto", r"tools: is a list; it must be a list of objects"),
        ({"messages": [USER, ANSWER], "tools": "f()"}, "auto", r"tools: is a string that is no JSON"),
        ({"messages": [USER, ANSWER], "system": "\ud83d"}, "auto", r"system: has half a character, \\ud83d"),
    ],
)
def test_a_row_that_has_no_such_form_names_what_is_wrong(row: Any, format: Format, message: str) -> None:
    (error,) = read(row, format).errors
    with pytest.raises(ValueError, match=message):
        raise error


def test_the_system_prompt_beside_the_messages_comes_first() -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [USER, ANSWER], "system": "s"},
        {"messages": [SYSTEM, USER, ANSWER], "system": "s"},
        {"conversations": [USER, ANSWER], "system": "s"},
    ]
    for row in rows:
        assert sound(row) == [SYSTEM, USER, ANSWER]
    nothings: list[Any] = [None, ""]
    for nothing in nothings:
        assert sound({"messages": [USER, ANSWER], "system": nothing}) == [USER, ANSWER]
    assert sound({"messages": [ANSWER, USER], "system": "s"}) == [SYSTEM, ANSWER, USER]
    (error,) = read({"messages": [USER, ANSWER | {"loss": 1}], "system": "s"}).errors
    assert error.field == "messages[1].loss"  # as the file counts


def test_what_only_rendering_shows_is_placed_as_the_file_counts() -> None:
    places = ["messages[0].content", "messages[2].content", "messages", "tools"]
    found = read({"messages": [USER, ANSWER], "system": "s"})
    assert [found.place(place) for place in places] == ["system", "messages[1].content", "messages", "tools"]
    found = read({"messages": [SYSTEM, USER, ANSWER], "system": "s"})
    assert [found.place(place) for place in places] == places


def test_tools_are_a_list_or_its_text() -> None:
    for tools in ([TOOL], json.dumps([TOOL])):
        assert read({"messages": [USER, ANSWER], "tools": tools}).tools == [TOOL]
    nothings: list[Any] = [None, [], "", "[]"]
    for nothing in nothings:
        found = read({"messages": [USER, ANSWER], "tools": nothing})
        assert found.tools is None and not found.errors


@pytest.mark.parametrize("name", ["reasoning", "thinking", "thoughts"])
@pytest.mark.parametrize("turns", ["messages", "conversations"])
def test_thinking_under_another_name_is_mapped_or_left_out_or_an_error(name: str, turns: str) -> None:
    row = {turns: [USER, ANSWER | {name: "r"}]}
    (error,) = read(row).errors
    assert str(error) == (
        f"f:9: messages[1].{name}: is not read under this name; map it, --data.fields '{{{name}: reasoning_content}}', "
        f"or leave it out, --data.fields '{{{name}: null}}'"
    )
    assert sound(row, **{name: "reasoning_content"}) == [USER, ANSWER | {"reasoning_content": "r"}]
    assert (
        sound(row, **{name: None}) == sound({turns: [USER, ANSWER | {name: None}]}, **{name: "loss"}) == [USER, ANSWER]
    )
    (error,) = read(
        {turns: [USER, ANSWER | {name: "r", "reasoning_content": "s"}]}, **{name: "reasoning_content"}
    ).errors
    assert error.field == f"{turns}[1].{name}" and "and reasoning_content is given too" in error.problem


@pytest.mark.parametrize(
    ("row", "field", "fields"),
    [
        ({"messages": [USER, ANSWER | {"weight": 0}]}, "messages[1].weight", {"weight": "loss"}),
        ({"messages": [USER, ANSWER], "system_prompt": "s"}, "system_prompt", {"system_prompt": "system"}),
        ({"messages": [USER, ANSWER], "functions": [TOOL]}, "functions", {"functions": "tools"}),
        ({"instruction": "q", "output": "a", "thinking": "r"}, "thinking", {"thinking": "reasoning_content"}),
        ({"messages": [USER, ANSWER], "reasoning_content": "r"}, "reasoning_content", {"reasoning_content": None}),
        ({"messages": [USER, ANSWER], "loss": False}, "loss", {"loss": None}),
        ({"messages": [USER, ANSWER | {"function_call": {}}]}, "messages[1].function_call", {"function_call": None}),
    ],
)
def test_other_names_that_change_what_is_trained_are_errors_until_mapped(
    row: dict[str, Any], field: str, fields: dict[str, str | None]
) -> None:
    (error,) = read(row).errors
    assert error.field == field and "--data.fields" in error.problem
    assert not read(row, **fields).errors


def test_a_mapped_weight_is_a_loss() -> None:
    row = {"messages": [USER, ANSWER | {"weight": 0}, USER, ANSWER | {"weight": 1}]}
    assert [turn.get("loss") for turn in sound(row, weight="loss")] == [None, False, None, True]
    (error,) = read({"messages": [USER, ANSWER | {"weight": 0.5}]}, weight="loss").errors
    assert "is 0.5; it must be true, false" in error.problem


def test_rows_and_turns_under_other_names_are_mapped() -> None:
    row = {"dialog": [{"speaker": "user", "text": "q"}, {"speaker": "assistant", "text": "a"}], "prompt": "s"}
    names = {"dialog": "messages", "speaker": "role", "text": "content", "prompt": "system"}
    assert sound(row, **names) == [SYSTEM, USER, ANSWER]
    assert sound({"question": "q", "answer": "a"}, question="instruction", answer="output") == [USER, ANSWER]


def test_a_name_must_be_mapped_to_one_of_ours() -> None:
    check_fields({"thinking": "reasoning_content", "id": None, "dialog": "conversations", "who": "from"})
    with pytest.raises(
        ValueError, match=r"data\.fields: 'thinking' is mapped to 'think', which is not one of our fields.*role, cont"
    ):
        check_fields({"thinking": "think"})


def test_what_nothing_reads_is_named() -> None:
    row = {
        "messages": [USER | {"read": "x", "name": "n"}, ANSWER | {"read": "x", "name": "m", "empty": None}],
        **{"source": "web", "tags": ["a"], "meta": {"a": 1}},  # text, or what may hold some
        **{"id": 7, "score": 0.5, "ok": True, "none": None, "no_text": "", "no_tags": []},
    }
    assert sorted(read(row).unread) == ["messages[].name", "messages[].read", "meta", "source", "tags"]
    assert read(row, source=None, tags=None, meta=None, read=None, name=None).unread == []
    assert sorted(read({"conversations": [USER, ANSWER], "input": "x"}).unread) == ["input"]
