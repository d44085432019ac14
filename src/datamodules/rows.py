"""A conversation in the common form, and everything that can be wrong with it."""

import reprlib
from collections.abc import Iterator
from typing import Any

from src.errors import UserError

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 100
shown = _REPR.repr  # a value for a message, long ones cut in the middle

ROLES = ("system", "user", "assistant", "tool")
MESSAGE_FIELDS = ("role", "content", "reasoning_content", "tool_calls", "loss")


class RowError(UserError):
    """One thing that is wrong with one row: `source` ("file:row"), `field` (a path inside the row) and `problem`,
    which states the value, the constraint and the remedy."""

    def __init__(self, source: str, field: str, problem: str) -> None:
        super().__init__(source, field, problem)
        self.source, self.field, self.problem = source, field, problem

    def __str__(self) -> str:
        return f"{self.source}: {self.field}: {self.problem}" if self.field else f"{self.source}: {self.problem}"


def row_errors(row: Any, source: str) -> Iterator[RowError]:
    """Everything that is wrong with one row `{"messages": [{"role", "content", ...}, ...]}`, which may have `tools`,
    and a `system` prompt that stands before the messages."""
    messages = row.get("messages")
    if not isinstance(messages, list):
        yield RowError(source, "messages", f"is {kind_of(messages)}; it must be a list of {{role, content}} objects")
        return
    if not messages:
        yield RowError(source, "messages", "is empty; a conversation needs at least one user and one assistant turn")
    previous: dict[str, Any] | None = {"role": "system"} if row.get("system") else None
    for index, message in enumerate(messages):
        field = f"messages[{index}]"
        if not isinstance(message, dict):
            yield RowError(source, field, f"is {kind_of(message)}; it must be an object with 'role' and 'content'")
            return
        role = message.get("role")
        if role not in ROLES:
            yield RowError(source, f"{field}.role", f"is {shown(role)}; it must be one of {', '.join(ROLES)}")
            return  # without roles the order of turns cannot be checked
        for where, problem in _message_problems(message):
            yield RowError(source, f"{field}.{where}", problem)
        if misplaced := _order_problem(previous, message):
            yield RowError(source, f"{field}.role", misplaced)
        previous = message
    yield from _surrogates(row, source)


def _message_problems(message: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(field, problem) of a single message."""
    assistant = message["role"] == "assistant"
    content, reasoning, calls = (message.get(key) for key in ("content", "reasoning_content", "tool_calls"))
    if "content" not in message and not (assistant and (calls or reasoning)):
        yield "content", "is missing; it must be a string, or null for empty"
    elif not isinstance(content, str | None):
        yield "content", f"is {kind_of(content)}; it must be a string, or null for empty"
    if not isinstance(reasoning, str | None):
        yield "reasoning_content", f"is {kind_of(reasoning)}; it must be a string or absent"
    elif reasoning and not assistant:
        yield "reasoning_content", f"is on a {message['role']} turn; only assistant turns reason: remove it"
    elif reasoning and isinstance(content, str) and content.lstrip().startswith("<think>"):
        yield "reasoning_content", "is given and content begins with <think> too; give the reasoning once"
    loss = message.get("loss")
    if not isinstance(loss, bool | None):
        yield (
            "loss",
            f"is {shown(loss)}; it must be true, false or absent (absent: assistant turns are trained on)",
        )
    elif loss and not assistant:
        yield "loss", f"is true on a {message['role']} turn; only assistant turns are trained on: remove it"
    if not calls and isinstance(calls, list | None):
        return
    if not assistant:
        yield "tool_calls", f"is on a {message['role']} turn; only assistant turns call tools: remove it"
    elif not isinstance(calls, list):
        yield "tool_calls", f"is {kind_of(calls)}; it must be a list of {{type, function: {{name, arguments}}}}"
    else:
        for index, call in enumerate(calls):
            function = call.get("function") if isinstance(call, dict) else None
            if not isinstance(function, dict):
                yield f"tool_calls[{index}].function", f"is {kind_of(function)}; it must be an object with 'name'"
                continue
            if not isinstance(function.get("name"), str):
                kind = kind_of(function.get("name"))
                yield f"tool_calls[{index}].function.name", f"is {kind}; it must be a string"
            if not isinstance(function.get("arguments"), str):
                kind = kind_of(function.get("arguments"))
                yield (
                    f"tool_calls[{index}].function.arguments",
                    f'is {kind}; it must be a string: give the arguments as JSON text, \'{{"city": "Rome"}}\'',
                )


def _order_problem(previous: dict[str, Any] | None, message: dict[str, Any]) -> str | None:
    """Why `message` cannot follow `previous`; None if it can."""
    role, before = message["role"], previous["role"] if previous else None
    if role == "system" and before not in (None, "system"):
        return f"is 'system' after a {before} turn; system turns come first: move it to the front"
    if role == "tool" and not (before == "tool" or (previous and before == "assistant" and previous.get("tool_calls"))):
        return "is 'tool', but no assistant turn with tool_calls comes before it"
    if role == "user" and before == "tool":
        return "is 'user' right after a tool's output; an assistant turn that answers it must come between"
    if role == "assistant" and before is None and message.get("loss") is not False:
        return "is 'assistant', the first turn of all; the user's turn that it answers must come before it"
    if role == "assistant" and before == "assistant":
        return "is 'assistant' right after another assistant turn; merge the two or put the user's turn between them"
    return None


def _surrogates(row: dict[str, Any], source: str) -> Iterator[RowError]:
    """Text with half a UTF-16 pair, which JSON can spell and no tokenizer can read."""
    stack: list[tuple[tuple[str | int, ...], Any]] = [((key,), row.get(key)) for key in ("tools", "messages", "system")]
    while stack:  # no recursion: a row may be nested as deep as JSON can be read
        path, value = stack.pop()
        if isinstance(value, dict):
            stack += [((*path, key), item) for key, item in value.items()]
            stack += [((*path, "a key"), key) for key in value if not key.isascii()]
        elif isinstance(value, list):
            stack += [((*path, index), item) for index, item in enumerate(value)]
        elif isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                field = "".join(f"[{part}]" if isinstance(part, int) else f".{ascii(part)[1:-1]}" for part in path)
                problem = f"has half a character, \\u{ord(value[error.start]):04x}, as character {error.start + 1}"
                yield RowError(source, field[1:], f"{problem}; remove it, or write both halves")


def kind_of(value: Any) -> str:
    """A value's type, in words."""
    names = {type(None): "null", dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return names.get(type(value)) or shown(value)
