"""What a chat template itself defines, found by rendering probes: how a turn ends, how thinking is written and kept.

No model's spelling is assumed but one: DeepSeek's published form, for templates that take thinking to be there without
showing how it is written (V3-0324 cuts it out of earlier answers, R1 also opens it in the prompt).
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from src.errors import UserError

Message = dict[str, Any]
Apply = Callable[[list[Message], bool], str]
"""Renders messages, with the generation prompt or without; ValueError where the template refuses them."""

# Stand for what a turn says; no template trims or changes them.
_ANSWER, _REASONING, _OUTPUT = "ASSISTANT-CONTENT-7f3a9c", "ASSISTANT-REASONING-2d81b4", "TOOL-OUTPUT-e05c66"
# Changed by a template that trims, escapes or rewrites; line breaks around reasoning belong to the form.
_PLAIN = '<b c="d">\'&{{x}}\\n é'
_QUESTION: Message = {"role": "user", "content": "?"}
_CALL: Message = {"tool_calls": [{"id": "callid000", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}
_TOOL: Message = {"role": "tool", "tool_call_id": "callid000", "name": "f", "content": _OUTPUT}
_OPENS = re.compile(r"(<[^<>/\s]+>)(\s*)$")
_CLOSES = re.compile(r"(</[^<>\s]*(?:think|thought|reason)[^<>\s]*>)\s*$")


@dataclass(frozen=True)
class Thinking:
    """A thinking block: its text stands between `opening` and `closing`, tags with the line breaks around them."""

    opening: str
    closing: str

    @property
    def tags(self) -> tuple[str, str]:
        return self.opening.strip(), self.closing.strip()

    def opened_by(self, prompt: str) -> int:
        """How many characters of the opening, its tag at least, the prompt ends with."""
        least = len(self.opening.rstrip())
        return next((n for n in range(len(self.opening), least - 1, -1) if prompt.endswith(self.opening[:n])), 0)


PUBLISHED = Thinking("<think>\n", "\n</think>\n\n")


@dataclass(frozen=True)
class Form:
    """How a template writes an assistant's turn.

    `end`: from behind the content to the token that ends the turn; `between`: from there to the next turn. `prompt`,
    `header`: behind `_QUESTION` alone, all that a server sends, and all that stands before an answer without reasoning.
    `bare`: by the role of the message before, what stands between the generation prompt and an answer without
    reasoning; None where the prompt opens the thinking. `thinking`: None where the template does not tell, for the
    reason `untold`. `off`: the generation prompt closes the thinking. `keeps_history`: reasoning of an earlier turn is
    shown. `shows_reasoning`: at least while the turn is the last. `content_verbatim`, `reasoning_verbatim`: shown as
    given. `seen`: all that was rendered.
    """

    prompt: str
    header: str
    end: str
    between: str
    bare: dict[str, str | None]
    thinking: Thinking | None
    untold: str
    off: bool
    keeps_history: bool
    shows_reasoning: bool
    content_verbatim: bool
    reasoning_verbatim: bool
    seen: str


def answer(content: str = _ANSWER, **fields: Any) -> Message:
    return {"role": "assistant", "content": content, **fields}


def ask(*messages: Message) -> list[Message]:
    """A conversation of one question and what follows."""
    return [_QUESTION, *messages]


def probe(apply: Apply, stops: Collection[str]) -> Form:
    """Finds a template's form.

    Args:
        stops: the tokenizer's added tokens, one of which ends a turn.

    Raises:
        ValueError: the template does not show an assistant's content, nothing ends a turn, or the prompt opens a
            thinking block of which nothing tells how it is closed.
    """
    seen: list[str] = []

    def show(messages: list[Message], generate: bool = False) -> str:
        seen.append(apply(messages, generate))
        return seen[-1]

    before, prompt, shown = show(ask()), show(ask(), True), show(ask(answer()))
    if not prompt.startswith(before) or not shown.startswith(before):
        raise UserError(
            "the chat template changes the text before an assistant turn when the turn is added, so that no prompt "
            "can be told from it: use the template that the model is served with"
        )
    header, mark, end = shown[len(before) :].partition(_ANSWER)
    if not mark or not end:
        raise UserError(
            "the chat template does not show an assistant turn's content followed by an end of turn; training "
            "needs both: use the template that the model is served with"
        )
    generation = prompt[len(before) :]
    end, between = _split_end(end, stops)
    shown_thinking = _shown_thinking(show, before, generation)
    thinking, untold = (shown_thinking, "") if shown_thinking else _untold_thinking(show, generation, header)
    bare = {"user": _rest(header, generation), "tool": _bare_after_tool(show, _rest(header, generation))}
    if bare["user"] is None and (thinking is None or not thinking.opened_by(prompt)):
        other = f"its generation prompt is {generation!r}, but {header!r} precedes an answer in the history"
        raise UserError(
            f"the chat template does not tell how a model answers: {untold if _OPENS.search(generation) else other}; "
            "use the template that the model is served with"
        )
    return Form(
        prompt=prompt,
        header=before + header,
        end=end,
        between=between,
        bare=bare,
        thinking=thinking,
        untold=untold,
        off=generation.rstrip().endswith(thinking.tags[1]) if thinking else _CLOSES.search(generation) is not None,
        keeps_history=_REASONING in show(ask(answer(reasoning_content=_REASONING), _QUESTION), True),
        shows_reasoning=shown_thinking is not None,
        content_verbatim=show(ask(answer(f" \n{_PLAIN}\n "))) == f"{before}{header} \n{_PLAIN}\n {end}{between}",
        reasoning_verbatim=shown_thinking is None
        or any(told(text, shown_thinking) == f" {_PLAIN} " for text in _reasoned(show, f" {_PLAIN} ")),
        seen="".join(seen),
    )


def reasoned_turns(reasoning: str) -> list[Message]:
    """Turns with this reasoning: the second, since Kimi-K2-Thinking shows that of a call and drops an answer's."""
    return [answer(reasoning_content=reasoning), answer(reasoning_content=reasoning, **_CALL)]


def told(text: str, thinking: Thinking) -> str:
    """The reasoning that a rendering of one of `reasoned_turns` shows; "" where it shows none."""
    head, mark, _ = text.partition(f"{thinking.closing}{_ANSWER}")
    return head.rpartition(thinking.opening)[2] if mark else ""


def _split_end(end: str, stops: Collection[str]) -> tuple[str, str]:
    """A model stops at the token that ends its turn; a line break behind it (ChatML) belongs to the next prompt."""
    ends = [(end.find(token), -len(token)) for token in stops if token in end]
    cut = min(ends)[0] - min(ends)[1] if ends else len(end)
    return end[:cut], end[cut:]


def _rest(header: str, generation: str) -> str | None:
    """What an answer's header has beside the generation prompt; None where they are not the same but for space."""
    if header.startswith(generation):
        return header[len(generation) :]
    return "" if header.rstrip() == generation.rstrip() else None


def _reasoned(show: Callable[..., str], reasoning: str) -> list[str]:
    shown = []
    for turn in reasoned_turns(reasoning):
        try:
            shown.append(show(ask(turn)))
        except ValueError:  # a template without calls
            continue
    return shown


def _shown_thinking(show: Callable[..., str], before: str, generation: str) -> Thinking | None:
    """The block in which the template shows `reasoning_content`; None where it does not show it.

    Raises:
        ValueError: it shows it in a form that cannot be taken apart.
    """
    for text in _reasoned(show, _REASONING):
        opening, mark, rest = text.removeprefix(before).partition(_REASONING)
        if not mark:
            continue
        closing, mark, _ = rest.partition(_ANSWER)
        if opening.startswith(generation) and opening != generation:
            opening = opening[len(generation) :]
        else:  # the prompt opens the thinking already, or closes an empty one
            tag = closing.strip().replace("/", "", 1)
            opening = opening[opening.rfind(tag) :] if tag != closing.strip() and tag in opening else ""
        if mark and opening.strip() and closing.strip():
            return Thinking(opening, closing)
        raise UserError(
            "the chat template shows reasoning_content, but not before the answer and between an opening and a closing "
            "tag; no target can be told from it: use the template that the model is served with"
        )
    return None


def _untold_thinking(show: Callable[..., str], generation: str, header: str) -> tuple[Thinking | None, str]:
    """The block of a template that never shows `reasoning_content`, by what it does show of its tags."""
    if _rest(header, generation) is None and (opens := _OPENS.search(generation)):
        tag, breaks = opens.groups()
        closing = tag.replace("<", "</", 1)
        if closing in header:  # V3.1: an answer of history stands behind it
            return Thinking(tag + breaks, f"{breaks}{closing}{header.rpartition(closing)[2]}"), ""
        if tag + breaks == PUBLISHED.opening:
            return PUBLISHED, ""
        return None, f"its generation prompt opens {tag!r}, and nothing in it shows how the thinking is closed"
    if closes := _CLOSES.search(generation):
        return None, f"its generation prompt ends with {closes[1]} (thinking is off)"
    merged = f"{PUBLISHED.opening}{_REASONING}{PUBLISHED.closing}{_ANSWER}"
    history = show(ask(answer(merged), _QUESTION))
    if _ANSWER in history and _REASONING not in history:
        return PUBLISHED, ""
    return None, "it neither shows reasoning_content nor cuts <think>...</think> out of earlier answers"


def _bare_after_tool(show: Callable[..., str], otherwise: str | None) -> str | None:
    """As `bare` behind a tool's output, where DeepSeek's templates have no generation prompt."""
    called = ask(answer(**_CALL), _TOOL)
    try:
        before, prompt, shown = show(called), show(called, True), show([*called, answer()])
    except ValueError:  # a template without tools
        return otherwise
    if not prompt.startswith(before) or not shown.startswith(before):
        return otherwise
    return _rest(shown[len(before) :].rpartition(_ANSWER)[0], prompt[len(before) :])
