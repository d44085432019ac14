"""Conversations to tokens and targets, by the tokenizer's own chat template.

Every prompt is what `tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True)` gives at inference, with
the template's quirks; nothing here spells a model's turn tokens. The template is not asked for the targets: DeepSeek's
removes everything up to `</think>` from an assistant turn, the last one too. A target is the assistant's own text,
`<think>\\n{reasoning}\\n</think>\\n\\n{answer}` and the template's end of turn, less what the generation prompt has.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from .template_fields import declares_tools, reads_field

HistoryReasoning = Literal["strip", "keep"]
Message = dict[str, Any]

# Stands for an assistant's content while the template shows what it puts around it; no template trims or strips it.
_MARK = "ASSISTANT-CONTENT-7f3a9c"
_MERGED = re.compile(r"\s*<think>\n?(.*?)\n?</think>(?:\n\n|\n)?(.*)", re.DOTALL)


@dataclass(frozen=True)
class Sample:
    """Tokens of one context and the half-open ranges [start, stop) of those that are trained on."""

    input_ids: list[int]
    target_spans: list[tuple[int, int]]


@dataclass(frozen=True)
class _Turn:
    message: Message  # as later turns see it: content without reasoning
    reasoning: str | None
    trained: bool


class ChatTemplate:
    """Renders conversations for training.

    Args:
        tokenizer: a tokenizer with a chat template.
        history_reasoning: "strip": a trained turn's context carries the answers of earlier turns alone, as at
            inference, so that a conversation becomes several samples where turns need different contexts. "keep": one
            sample with the reasoning of every turn in its place.

    Raises:
        ValueError: the template does not show an assistant's content or nothing ends a turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, history_reasoning: HistoryReasoning = "strip") -> None:
        self.tokenizer = tokenizer
        self.history_reasoning = history_reasoning
        question = [{"role": "user", "content": "?"}]
        before = self._apply(question, generate=False)
        header, mark, end = self._after(before, [*question, {"role": "assistant", "content": _MARK}]).partition(_MARK)
        if not mark or not end:
            raise ValueError(
                "the chat template does not show an assistant turn's content followed by an end of turn; training "
                "needs both: use the template that the model is served with"
            )
        generation = self._after(before, question, generate=True)
        self._before_content = before + header
        # What the template itself puts between the generation prompt and a plain answer; nothing in DeepSeek's.
        self._opening = header.removeprefix(generation) if header.startswith(generation) else ""
        # A model stops at the token that ends its turn; a line break behind it (ChatML) belongs to the next prompt.
        stops = [(end.find(token), -len(token)) for token in self._added_tokens() if token in end]
        cut = min(stops)[0] - min(stops)[1] if stops else len(end)
        self._end, self._between = end[:cut], end[cut:]
        self._declares_tools = {system: declares_tools(self._apply, system) for system in (False, True)}
        self._reads: dict[tuple[str, str], bool] = {}

    def render(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[Sample]:
        """Samples of one valid conversation (see `rows.row_errors`); each trained turn is a target exactly once.

        Raises:
            ValueError: the template refuses the conversation, or has no place for what it says.
        """
        turns = [_turn(message) for message in messages]
        return self._keep(turns, tools) if self.history_reasoning == "keep" else self._strip(turns, tools)

    def declares_tools(self, messages: Sequence[Message]) -> bool:
        """Whether tools beside these messages reach the prompt."""
        return self._declares_tools[messages[0]["role"] == "system"]

    def reads(self, role: str, field: str) -> bool:
        """Whether the template looks at a field of this name, beside those of `rows.MESSAGE_FIELDS`, on such a turn."""
        if (role, field) not in self._reads:
            self._reads[role, field] = reads_field(self._apply, role, field)
        return self._reads[role, field]

    def _strip(self, turns: list[_Turn], tools: list[Any] | None) -> list[Sample]:
        samples: list[Sample] = []
        for index, turn in enumerate(turns):
            if not turn.trained:
                continue
            prompt = self._apply([earlier.message for earlier in turns[:index]], generate=True, tools=tools)
            prompt_ids = self._encode(prompt)
            target_ids = self._encode(self._target(turn, prompt))
            spans = [(len(prompt_ids), len(prompt_ids) + len(target_ids))]
            if samples and prompt_ids[: len(samples[-1].input_ids)] == samples[-1].input_ids:
                spans = samples.pop().target_spans + spans
            samples.append(Sample(prompt_ids + target_ids, spans))
        return samples

    def _keep(self, turns: list[_Turn], tools: list[Any] | None) -> list[Sample]:
        messages = [turn.message for turn in turns]
        input_ids: list[int] = []
        spans: list[tuple[int, int]] = []
        rendered = ""  # the conversation up to and with the last assistant turn, as the template has it
        last = max((index for index, turn in enumerate(turns) if turn.trained), default=-1)
        for index, turn in enumerate(turns[: last + 1]):
            if turn.message["role"] != "assistant":
                continue
            prompt = self._apply(messages[:index], generate=True, tools=tools)
            if not prompt.startswith(rendered):
                raise ValueError(
                    f"the chat template renders the turns before messages[{index}] differently once they are history; "
                    "use history_reasoning 'strip'"
                )
            piece = (self._between if rendered else "") + prompt[len(rendered) :]
            input_ids += self._encode(piece)
            target_ids = self._encode(self._target(turn, prompt))
            if turn.trained:
                spans.append((len(input_ids), len(input_ids) + len(target_ids)))
            input_ids += target_ids
            rendered = self._apply(messages[: index + 1], generate=False, tools=tools)
        return [Sample(input_ids, spans)] if spans else []

    def _target(self, turn: _Turn, prompt: str) -> str:
        """What the model is to write behind `prompt`: its thinking, its answer or tool calls, the end of turn."""
        body = self._body(turn.message)
        thinking = f"{turn.reasoning or ''}\n</think>\n\n{body}"
        if prompt.endswith("<think>\n"):
            return thinking
        if prompt.endswith("<think>"):
            return f"\n{thinking}"
        if turn.reasoning is None:
            return self._opening + body
        if prompt.endswith("</think>"):
            raise ValueError(
                "the chat template's generation prompt ends with </think> (thinking is off), but the turn has "
                "reasoning; remove reasoning_content or use a template that lets the model think"
            )
        return f"<think>\n{thinking}"

    def _body(self, message: Message) -> str:
        """Content, tool calls and end of turn. Calls are rendered behind a lone question: DeepSeek's template opens
        only the first calls of a conversation properly, and a model must write every one of them so."""
        content = message["content"]
        if "tool_calls" not in message:
            return f"{content}{self._end}"
        calling = [{"role": "user", "content": "?"}, {**message, "content": _MARK if content else ""}]
        text = self._after(self._before_content, calling)
        return text.removesuffix(self._between).replace(_MARK, content)

    def _after(self, before: str, messages: list[Message], generate: bool = False) -> str:
        text = self._apply(messages, generate)
        if not text.startswith(before):
            raise ValueError(
                f"the chat template renders {messages[-1]['role']} turns in a form that cannot be told from their "
                f"prompt: {text!r} does not begin with {before!r}"
            )
        return text[len(before) :]

    def _apply(self, messages: list[Message], generate: bool, tools: list[Any] | None = None) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=generate
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error
        except Exception as error:  # a template raises what Python does with the data: TypeError, KeyError, ...
            raise ValueError(f"the chat template refuses the conversation: {type(error).__name__}: {error}") from error
        assert isinstance(text, str)
        return text

    def _encode(self, text: str) -> list[int]:
        """The template writes BOS itself, so no special token is added."""
        ids: list[int] = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _added_tokens(self) -> list[str]:
        return [token.content for token in self.tokenizer.added_tokens_decoder.values()]


def _turn(message: Message) -> _Turn:
    """Takes a message apart. Nulls (Parquet fills absent fields with them), an empty `tool_calls` and an empty
    `reasoning_content` count as absent; a thinking block merged into the content, an empty one too, becomes reasoning.
    """
    kept = {key: value for key, value in message.items() if value is not None and key not in ("loss", "tool_calls")}
    content, reasoning = message.get("content") or "", kept.pop("reasoning_content", None) or None
    assistant = message["role"] == "assistant"
    if assistant and (merged := _MERGED.fullmatch(content)):
        reasoning, content = merged.groups()
    kept["content"] = content
    if calls := message.get("tool_calls"):
        kept["tool_calls"] = [{"type": "function", **_without_nulls(call)} for call in calls]
    return _Turn(kept, reasoning, assistant and message.get("loss") is not False)


def _without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}
