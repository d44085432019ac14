"""Rows made from a seed: sound, dressed (the same conversation as other data spells it) or broken; see `fuzz`."""

import copy
import json
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .forms import Known

Row = dict[str, Any]
WORDS = [
    "a",
    "9.11",
    "你好",
    "\n",
    " ",
    "<b>",
    "x < y",
    "```json\n{}\n```",
    "é",
    "\t",
    "🙂",
    "</b>",
    "1 << 2",
    "\\n",
    "{{x}}",
]
CONTROLS = [
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜begin▁of▁sentence｜>",
    "<｜tool▁sep｜>",
    "<|EOT|>",
    "<|im_end|>",
    "<｜end▁of▁sentence｜>",
]


def text(rng: random.Random, least: int = 0) -> str:
    said = "".join(rng.choice(WORDS) for _ in range(rng.randint(least, 6)))
    return said if not least or said.strip() else "said"


def sound_row(rng: random.Random, reasoning: bool, calls: bool) -> list[Row]:
    messages: list[Row] = [{"role": "system", "content": text(rng)}] * rng.choice([0, 0, 1])
    for _ in range(rng.choice([1, 1, 2, 3])):
        messages.append({"role": "user", "content": text(rng, 1)})
        for number in range(rng.choice([0, 0, 1, 2]) if calls else 0):
            call = {"id": f"f:{number}", "type": "function", "function": {"name": "f", "arguments": '{"q": "é"}'}}
            messages.append({"role": "assistant", "content": text(rng), "tool_calls": [call] * rng.choice([1, 1, 2])})
            messages.append({"role": "tool", "tool_call_id": f"f:{number}", "content": text(rng)})
        messages.append({"role": "assistant", "content": text(rng)})
    for message in messages:
        if message["role"] == "assistant":
            message["loss"] = rng.random() < 0.8
            if reasoning and rng.random() < 0.6:
                message["reasoning_content"] = text(rng, 1).strip("\n")
                message["content"] = message["content"].lstrip("\n")
    return messages


def dress(rng: random.Random, messages: list[Row], end: str) -> list[Row]:
    """The same conversation as other data spells it."""
    dressed = copy.deepcopy(messages)
    for message in dressed:
        reasoning = message.get("reasoning_content")
        if reasoning is not None:
            way = rng.randrange(5)
            if way < 3:
                del message["reasoning_content"]
                opening = ["<think>\n", " <think>", ""][way]
                message["content"] = (
                    f"{opening}{reasoning}{rng.choice(['', chr(10)])}</think>{chr(10) * rng.randrange(3)}"
                    + (message["content"])
                )
            elif way == 3:
                message["reasoning_content"] = f"\n{reasoning}\n"
                message["content"] = "\n\n" + message["content"]
        if message["role"] == "assistant" and "tool_calls" not in message and rng.random() < 0.2:
            message["content"] += end * rng.choice([1, 2]) + rng.choice(["", "\n"]) if message["content"] else ""
        if rng.random() < 0.1:
            message["name" if message["role"] == "tool" else "loss"] = None
        if message["role"] == "assistant" and message.get("loss") is None and "loss" in message:
            message["loss"] = next(m["loss"] for m, d in zip(messages, dressed, strict=True) if d is message) or None
            if message["loss"] is None:
                message["loss"] = False
    return dressed


def _some_message(rng: random.Random, row: Row) -> Row:
    messages = row.get("messages")
    return rng.choice(messages) if isinstance(messages, list) and messages else {}


def _set(key: str, *values: Any) -> Callable[[random.Random, Row], None]:
    def mutate(rng: random.Random, row: Row) -> None:
        message = _some_message(rng, row)
        if isinstance(message, dict):
            message[key] = rng.choice(values)

    return mutate


def _insert(strings: list[str]) -> Callable[[random.Random, Row], None]:
    def mutate(rng: random.Random, row: Row) -> None:
        message = _some_message(rng, row)
        key = rng.choice(["content", "content", "reasoning_content"])
        if isinstance(message, dict) and isinstance(message.get(key), str):
            at = rng.randint(0, len(message[key]))
            message[key] = message[key][:at] + rng.choice(strings) + message[key][at:]

    return mutate


def _arguments(rng: random.Random, row: Row) -> None:
    for message in row["messages"] if isinstance(row.get("messages"), list) else []:
        if isinstance(message, dict) and message.get("tool_calls"):
            message["tool_calls"] = copy.deepcopy(message["tool_calls"])
            message["tool_calls"][0]["function"]["arguments"] = rng.choice(
                ["{'a': 1}", '{"a": ', "", "[1]", '"x"', '{"a": NaN}', '{"a": 1} x', "[" * 5000,
                 '{"n": 1' + "0" * 5000 + "}", ' {"a": "\\ud800"} ', None, {"a": 1}, '{"a": "\n"}']
            )  # fmt: skip


def _order(rng: random.Random, row: Row) -> None:
    if isinstance(row.get("messages"), list):
        messages = row["messages"]
        rng.choice([lambda: rng.shuffle(messages), lambda: messages.pop() if messages else None, messages.clear,
                    lambda: messages.append(_some_message(rng, row)), lambda: messages.insert(0, None)])()  # fmt: skip


def _nest(rng: random.Random, row: Row) -> None:
    value: Any = "x"
    for _ in range(rng.choice([3, 50, 400])):
        value = [value] if rng.random() < 0.5 else {"a": value}
    target = rng.choice([row, _some_message(rng, row)])
    if isinstance(target, dict):
        target[rng.choice(["content", "extra", "tools", "messages"])] = value


ROW_FAULTS: list[Callable[[random.Random, Row], None]] = [
    _set("content", None, 1, [], ["a"], {"type": "text"}, True, "", " \n", 1.5),
    _set("role", None, "bot", "", 3, "tool", "assistant", "system", "user"),
    _set("reasoning_content", None, 1, "", "\n", "x", ["x"]),
    _set("loss", "yes", 0, None, True, False),
    _set("tool_calls", [], {}, [None], [{}], "x", [{"function": {"name": 1, "arguments": "{}"}}]),
    _set("thinking", "x", None),
    _set("name", "x", None),
    _insert(CONTROLS),
    _insert(["<think>", "</think>", "<think></think>", "\n</think>\n\n"]),
    _insert(["\ud800", "\udfff", "\x00", "\ufdd0", "\ufdd1", "\u2028", "\ufeff", "\r\n"]),
    _arguments,
    _order,
    _nest,
    lambda rng, row: row.pop("messages", None),
    lambda rng, row: row.update(messages=rng.choice([None, 1, "x", {}, [[]], [None], [{}]])),
]


def _cut(rng: random.Random, line: bytes) -> bytes:
    return line[: rng.randrange(len(line))]


def _spoil(rng: random.Random, line: bytes) -> bytes:
    at = rng.randrange(len(line))
    return (
        line[:at]
        + rng.choice([b"\xff", b"\xc3", b"\x00", b"\x1f", b'"', b"}", b"]", b",", b"\\", b"//", b"\\x"])
        + line[at + 1 :]
    )


def _swap(old: bytes, *new: bytes) -> Callable[[random.Random, bytes], bytes]:
    return lambda rng, line: line.replace(old, rng.choice(new), rng.choice([1, -1]))


LINE_FAULTS: list[Callable[[random.Random, bytes], bytes]] = [
    _cut,
    _spoil,
    lambda rng, line: line + rng.choice([b" x", b"{}", b",", b"\x00", b" ", b"\t\r", b"]", b" // a"]),
    lambda rng, line: rng.choice([b"\xef\xbb\xbf", b" ", b"x", b",", b"null ", b"["]) + line,
    _swap(b'"', b"'", b"", b'\\"'),
    _swap(b",", b"", b",,"),
    _swap(b": ", b"=", b" ", b":"),
    _swap(b"true", b"True", b"NaN", b"Infinity", b"tru", b"1e999"),
    lambda rng, line: rng.choice([b"null", b"1", b'"x"', b"[]", b"{}", b"NaN", b"-"]),
    lambda rng, line: rng.choice([b"[", b'{"a":']) * 100_000,
    lambda rng, line: line[:-1] + b', "messages": ' + rng.choice([b"1}", b"[]}", b"null}"]),
    _swap(b'"content": "', *(b'"content": "' + text for text in (rb"\ud800", rb"\u00", rb"\q", b"\t", rb"\u0041"))),
]  # fmt: skip


def file_of(rng: random.Random, rows: int, known: Known, end: str, path: Path) -> dict[int, list[Row]]:
    """Writes rows to a JSON Lines file; returns what the dressed ones mean, by line."""
    meant: dict[int, list[Row]] = {}
    with open(path, "wb") as file:
        for number in range(1, rows + 1):
            messages = sound_row(rng, known.thinking is not None or rng.random() < 0.1, "tool_call" in known.template)
            row: Row = {"messages": copy.deepcopy(messages)}
            kind = rng.randrange(4) if number > 1 else 0  # the first line tells that it is a file of lines
            if kind == 1:
                row["messages"] = dress(rng, messages, end)
            if kind < 2:
                meant[number] = messages
            for _ in range(rng.randint(1, 2) if kind == 2 else 0):
                with suppress(AttributeError, LookupError, TypeError):  # the first fault may leave the second nothing
                    rng.choice(ROW_FAULTS)(rng, row)
            line = json.dumps(row, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
            if kind == 3:
                line = rng.choice(LINE_FAULTS)(rng, line)
            file.write(line.replace(b"\n", b" ") + b"\n")
    return meant
