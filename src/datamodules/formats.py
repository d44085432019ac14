"""Rows as files have them to conversations: fields under other names, ShareGPT, Alpaca, a row's own system prompt.

Whatever a row says is read, or an error, or named as not read (`Conversation.unread`).
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from src.errors import UserError

from .rows import MESSAGE_FIELDS, RowError, kind_of, row_errors, shown

Format = Literal["auto", "messages", "sharegpt", "alpaca"]
Fields = Mapping[str, str | None]  # a name in the data -> ours, or None: left out
TemplateReads = Callable[[str, str], bool]  # (role, field)

# What a row of each format has, its turns first.
ROW_FIELDS = {
    "messages": ("messages", "system", "tools"),
    "sharegpt": ("conversations", "system", "tools"),
    "alpaca": ("instruction", "output", "input", "history", "reasoning_content", "system", "tools"),
}
_REQUIRED = {"messages": ("messages",), "sharegpt": ("conversations",), "alpaca": ("instruction", "output")}
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
# Names that others give to our fields; each changes what is trained on.
_OTHER_NAMES = {
    "reasoning": "reasoning_content",
    "thinking": "reasoning_content",
    "thoughts": "reasoning_content",
    "function_call": "tool_calls",
    "weight": "loss",
}
_OTHER_ROW_NAMES = {**_OTHER_NAMES, "system_prompt": "system", "functions": "tools"}
_OF_A_TURN = ("reasoning_content", "tool_calls", "loss")


@dataclass
class Conversation:
    """A row ("file:row") as training takes it, and all that is wrong with it.

    `messages`, `tools`: for the chat template, where `errors` is empty; the first `added` messages are no turns of the
    row. `unread`: fields with something to say that nothing reads, "source" or "messages[].name".
    """

    source: str
    format: str | None = None
    messages: list[Any] = field(default_factory=list)
    added: int = 0
    tools: list[Any] | None = None
    errors: list[RowError] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    def wrong(self, where: str, problem: str) -> None:
        self.errors.append(RowError(self.source, where, problem))

    def place(self, where: str) -> str:
        """Where in the row a field of `messages` is."""
        match = re.match(r"messages\[(\d+)\]", where)
        if match is None or not self.added:
            return where
        index = int(match[1]) - self.added
        return f"messages[{index}]{where[match.end() :]}" if index >= 0 else "system"


def check_fields(fields: Fields) -> None:
    """Raises ValueError where a name is mapped to a field that there is not."""
    known = dict.fromkeys(
        ("from", "value", *MESSAGE_FIELDS, *(name for names in ROW_FIELDS.values() for name in names))
    )
    for name, ours in fields.items():
        if ours is not None and ours not in known:
            raise UserError(
                f"data.fields: {name!r} is mapped to {ours!r}, which is not one of our fields; give one of "
                f"{', '.join(known)}, or null to leave {name!r} out"
            )


def read_row(value: Any, source: str, fields: Fields, format: Format, template_reads: TemplateReads) -> Conversation:
    """The conversation of one row as `reader.read_span` yields it.

    Args:
        template_reads: whether the chat template looks at a field of this name on a message of this role.
    """
    conversation = Conversation(source)
    if isinstance(value, RowError):
        conversation.errors.append(value)
    elif not isinstance(value, dict):
        conversation.wrong("", f"is {kind_of(value)}; a row must be an object, with 'messages', say")
    else:
        row = _renamed(value, "", fields, conversation)
        conversation.format = _format(row, format, conversation)
        if conversation.format is not None:
            _check_row_fields(row, conversation)
            turns = _TURNS[conversation.format](row, fields, conversation)
            if turns is not None:
                _take(turns, row, conversation, template_reads)
    return conversation


def _take(turns: list[Any], row: dict[str, Any], conversation: Conversation, template_reads: TemplateReads) -> None:
    """Checks what a row comes to in our own form, and keeps it."""
    for index, turn in enumerate(turns):
        if isinstance(turn, dict):
            _check_turn_fields(turn, f"messages[{index}]", conversation, template_reads)
    system = row.get("system") or None
    first = turns[0] if turns and isinstance(turns[0], dict) and turns[0].get("role") == "system" else None
    if not isinstance(system, str | None):
        conversation.wrong("system", f"is {kind_of(system)}; it must be a string")
        system = None
    elif system and first and first.get("content") != system:
        conversation.wrong("system", "is given beside the messages, which begin with another system turn; give it once")
    conversation.tools = _tools(row.get("tools"), conversation)
    conversation.errors += row_errors(
        {"messages": turns, "system": system, "tools": conversation.tools}, conversation.source
    )
    conversation.messages = turns
    if system and not first:
        conversation.messages, conversation.added = [{"role": "system", "content": system}, *turns], 1


# Fields --------------------------------------------------------------------------------------------------------------


def _renamed(fields_of: dict[str, Any], where: str, fields: Fields, conversation: Conversation) -> dict[str, Any]:
    """An object's fields under our names."""
    if not fields.keys() & fields_of.keys():
        return fields_of
    renamed = {key: value for key, value in fields_of.items() if key not in fields}
    for key in fields_of.keys() & fields.keys():
        ours, value = fields[key], fields_of[key]
        if ours is None or value is None:
            continue
        if renamed.get(ours) is not None:
            conversation.wrong(
                where + key, f"is mapped to {ours} by data.fields, and {ours} is given too; give one of them"
            )
        # Others write 0 and 1 for what is false and true here.
        renamed[ours] = bool(value) if ours == "loss" and value in (0, 1) else value
    return renamed


def _check_row_fields(row: dict[str, Any], conversation: Conversation) -> None:
    assert conversation.format is not None
    read = ROW_FIELDS[conversation.format]
    for key, value in row.items():
        if key in read or value is None:
            continue
        if key in _OF_A_TURN:
            conversation.wrong(
                key, f"is given beside the turns; write it into the turn that it is of, {_or_leave_out(key)}"
            )
        elif key in _OTHER_ROW_NAMES:
            conversation.wrong(key, _mapped(key, _OTHER_ROW_NAMES[key]))
        elif value and isinstance(value, str | list | dict):
            conversation.unread.append(key)


def _check_turn_fields(
    turn: dict[str, Any], where: str, conversation: Conversation, template_reads: TemplateReads
) -> None:
    for key, value in turn.items():
        if key in MESSAGE_FIELDS or value is None:
            continue
        if key in _OTHER_NAMES:
            conversation.wrong(f"{where}.{key}", _mapped(key, _OTHER_NAMES[key]))
        elif (
            not template_reads(str(turn.get("role")), key) and (name := f"messages[].{key}") not in conversation.unread
        ):
            conversation.unread.append(name)


def _mapped(key: str, ours: str) -> str:
    return f"is not read under this name; map it, --data.fields '{{{key}: {ours}}}', {_or_leave_out(key)}"


def _or_leave_out(key: str) -> str:
    return f"or leave it out, --data.fields '{{{key}: null}}'"


def _tools(tools: Any, conversation: Conversation) -> list[Any] | None:
    """A row's tools, which may be JSON text; None where there are none."""
    if isinstance(tools, str) and tools:
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            conversation.wrong("tools", f"is a string that is no JSON ({error}); give a list of tools")
            return None
    if not tools and isinstance(tools, list | str | None):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        conversation.wrong("tools", f"is {kind_of(tools)}; it must be a list of objects {{type, function}}")
        return None
    return tools


# Formats -------------------------------------------------------------------------------------------------------------


def _format(row: dict[str, Any], format: Format, conversation: Conversation) -> str | None:
    """The format of a row; None, and an error, where it has not the fields of it."""
    given = [name for name, required in _REQUIRED.items() if all(row.get(key) is not None for key in required)]
    if format != "auto":
        given = [format] if format in given else []
    if len(given) > 1:
        fields = " and ".join(_REQUIRED[name][0] for name in given)
        conversation.wrong("", f"has {fields}; name the one to read: --data.format {' or '.join(given)}")
        return None
    if given:
        return given[0]
    wanted = (
        "messages, or conversations (ShareGPT), or instruction and output (Alpaca)"
        if format == "auto"
        else " and ".join(_REQUIRED[format])
    )
    first = _REQUIRED["messages" if format == "auto" else format][0]
    problem = "is null" if first in row else f"is missing (fields: {', '.join(ascii(key)[1:-1] for key in row)})"
    conversation.wrong(first, f"{problem}; a row must have {wanted}, or be mapped to that by --data.fields")
    return None


def _list(row: dict[str, Any], name: str, fields: Fields, conversation: Conversation) -> list[Any] | None:
    if not isinstance(row[name], list):
        conversation.wrong(name, f"is {kind_of(row[name])}; it must be a list of turns")
        return None
    return [
        _renamed(turn, f"{name}[{index}].", fields, conversation) if isinstance(turn, dict) else turn
        for index, turn in enumerate(row[name])
    ]


def _messages(row: dict[str, Any], fields: Fields, conversation: Conversation) -> list[Any] | None:
    return _list(row, "messages", fields, conversation)


def _sharegpt(row: dict[str, Any], fields: Fields, conversation: Conversation) -> list[Any] | None:
    turns = _list(row, "conversations", fields, conversation)
    if turns is None:
        return None
    messages: list[Any] = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict):
            messages.append(turn)
            continue
        where = f"conversations[{index}]"
        message = {key: value for key, value in turn.items() if key not in ("from", "value")}
        for theirs, ours in (("from", "role"), ("value", "content")):
            if turn.get(theirs) is not None and turn.get(ours) is not None:
                conversation.wrong(f"{where}.{theirs}", f"is given beside {ours}; give one of them")
            elif theirs in turn:
                message[ours] = turn[theirs]
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            conversation.wrong(f"{where}.from", f"is {shown(role)}; it must be one of {', '.join(_ROLES)}")
            return None
        messages.append({**message, "role": _ROLES[role]})
    return messages


def _alpaca(row: dict[str, Any], fields: Fields, conversation: Conversation) -> list[Any] | None:
    for name in ("instruction", "input", "output"):
        if not isinstance(row.get(name), str | None):
            conversation.wrong(name, f"is {kind_of(row[name])}; it must be a string")
    history = row.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in history
    ):
        conversation.wrong("history", f"is {kind_of(history)}; it must be a list of [question, answer]")
    if conversation.errors:
        return None
    question = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
    pairs = [*history, [question, row["output"]]]
    roles = ("user", "assistant")
    turns = [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]
    if row.get("reasoning_content") is not None:
        turns[-1]["reasoning_content"] = row["reasoning_content"]
    return turns


_TURNS = {"messages": _messages, "sharegpt": _sharegpt, "alpaca": _alpaca}
