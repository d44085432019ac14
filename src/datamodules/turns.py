"""Messages taken apart into turns of one form, and what does not fit it.

What is beyond doubt is put right: thinking merged into the content or without its opening tag, line breaks around
thinking that a server parsed, an answer's own end of turn. All else is named.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from src.errors import UserError

from .control_tokens import ControlTokens, ControlTokenText
from .template_form import PUBLISHED, Form, Message


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


_ARGUMENTS = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=_no_number)  # numbers of any length
_BREAKS = "\r\n"
_CONTROL = (
    "holds the control token {!r}; remove it, or set --data.control_tokens to text (it is encoded as ordinary text) or "
    "keep (as the token)"
)


class Misfit(UserError):
    """What in a conversation does not fit: `problems`, (field, a path inside the row; what is wrong with it)."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "; ".join(f"{field}: {problem}" for field, problem in self.problems)


@dataclass(frozen=True)
class Turn:
    """`message`: as a server would send it once it is history, reasoning apart as `reasoning_content`.

    `reasoning` is "" for a thinking block without text and None without a block.
    """

    message: Message
    reasoning: str | None
    trained: bool


class TurnReader:
    """Takes messages apart for a template of some form."""

    def __init__(self, form: Form, controls: ControlTokenText, control_tokens: ControlTokens) -> None:
        own = [form.thinking.tags] if form.thinking is not None else []
        self._tags = list(dict.fromkeys([*own, PUBLISHED.tags]))
        self._form, self._controls, self._control_tokens = form, controls, control_tokens

    def read(self, messages: Sequence[Message], tools: list[Any] | None) -> tuple[list[Turn], list[Any] | None]:
        """The turns of a conversation that `rows.row_errors` finds sound, and the tools that it has.

        Raises:
            Misfit: with all that does not fit.
        """
        turns: list[Turn] = []
        tools, faults = self._controlled(tools)
        problems = [(f"tools{path}", problem) for path, problem in faults]
        for index, message in enumerate(messages):
            turn, faults = self._take_apart(message)
            problems += [(f"messages[{index}].{name}".rstrip("."), problem) for name, problem in faults]
            turns.append(turn)
        if problems:
            raise Misfit(problems)
        return turns, tools

    def _take_apart(self, message: Message) -> tuple[Turn, list[tuple[str, str]]]:
        """Nulls (Parquet fills absent fields with them), an empty `tool_calls` and an empty `reasoning_content` count
        as absent."""
        said = {key: value for key, value in message.items() if value is not None and key not in ("loss", "role")}
        role, calls = message["role"], said.pop("tool_calls", None) or []
        trained = role == "assistant" and message.get("loss") is not False
        problems = list(_argument_problems(calls))
        content, reasoning, source = said.get("content", ""), said.pop("reasoning_content", None) or None, "content"
        if calls:
            said["tool_calls"] = [{"type": "function", **_without_nulls(call)} for call in calls]
        elif role == "assistant":
            content = _without_end(content, self._form.end.strip())
        if role == "assistant":
            source = "content" if reasoning is None else "reasoning_content"
            try:
                reasoning, content = self._split(content, reasoning)
            except ValueError as error:
                problems.append((source, str(error)))
            if reasoning is not None:  # a server's fields have the form's line breaks around them
                reasoning, content = reasoning.strip(_BREAKS), content.lstrip(_BREAKS)
            if trained and reasoning and not problems and (problem := self._no_place()):
                problems.append((source, problem))
        elif role == "user" and not content.strip():
            fault = "is null" if message.get("content") is None else f"is {content!r}"
            problems.append(("content", f"{fault}; a question needs text: give it or remove the row"))
        said["content"] = content
        if reasoning is not None:
            said["reasoning_content"] = reasoning
        said, controls = self._controlled(said)
        for path, problem in controls:
            name = path.removeprefix(".")
            problems.append((source if name == "reasoning_content" else name, problem))
        return Turn({"role": role, **said}, said.get("reasoning_content"), trained), problems

    def _controlled(self, value: Any) -> tuple[Any, list[tuple[str, str]]]:
        """A value with its control tokens marked as text, or (path, problem) of each."""
        if self._control_tokens == "text":
            try:
                return self._controls.mark(value), []
            except ValueError as error:
                return value, [("", str(error))]
        if self._control_tokens == "keep":
            return value, []
        return value, [(path, _CONTROL.format(token)) for path, token in self._controls.find(value)]

    def _split(self, content: str, reasoning: str | None) -> tuple[str | None, str]:
        """(thinking, answer) of an assistant's content and `reasoning_content`.

        Raises:
            ValueError: thinking tags stand where a model writes none.
        """
        for opens, closes in self._tags:
            if reasoning and (opens in reasoning or closes in reasoning):
                raise UserError(f"holds {opens} or {closes}; give the thinking without its tags")
            if opens not in content and closes not in content:
                continue
            thinking, closed, rest = content.partition(closes)
            before, opened, inside = thinking.partition(opens)
            if not closed:
                raise UserError(f"opens thinking with {opens} and never closes it; add {closes} or remove the tag")
            if reasoning is not None:
                raise UserError("holds thinking beside reasoning_content; give the thinking once")
            if (opened and before.strip()) or any(tag in inside + rest for tag in (opens, closes)):
                raise UserError(
                    f"has thinking tags elsewhere than around one block at its beginning; a model writes {opens} and "
                    f"{closes} once: remove the others"
                )
            return inside if opened else thinking, rest  # no tag to open it: the prompt had that
        return reasoning, content

    def _no_place(self) -> str | None:
        """Why a turn cannot have reasoning; None where it can."""
        form = self._form
        if form.off:
            return (
                "is reasoning, but the chat template's generation prompt ends with a closed thinking block (thinking "
                "is off); remove it, or let the template think, by --data.chat_template_kwargs if it has a variable"
            )
        if form.thinking is None:
            return (
                f"is reasoning, but the chat template does not tell how thinking is written: {form.untold}; remove it "
                "or use a template that renders reasoning_content"
            )
        return None


def _without_end(content: str, end: str) -> str:
    """The answer without the end of turn that the data has already."""
    while end and content.rstrip().endswith(end):
        content = content.rstrip().removesuffix(end)
    return content


def _argument_problems(calls: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for index, call in enumerate(calls):
        arguments = call["function"]["arguments"]
        try:
            problem = None if isinstance(_ARGUMENTS.decode(arguments), dict) else "it is no object"
        except (ValueError, RecursionError) as error:
            problem = str(error)
        if problem is not None:
            short = arguments if len(arguments) <= 60 else arguments[:60] + "..."
            yield (
                f"tool_calls[{index}].function.arguments",
                f"is {short!r}, no JSON object ({problem}); a server that parses the call must be able to read it: "
                "write the arguments as JSON text, {} for none",
            )


def _without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}
