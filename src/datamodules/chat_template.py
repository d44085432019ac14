"""Conversations to tokens and targets, by the tokenizer's own chat template.

Every context is what `tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True)` gives at inference, with
the template's quirks: it gets earlier reasoning as `reasoning_content` and decides what is kept. A target is what the
model must write next, in the form that the template itself defines (`template_form.probe`): its thinking, its answer or
tool calls, and the end of its turn. Where a template shows a whole last turn, context and target are that rendering;
DeepSeek's cut the thinking off every answer, the last one too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from src.errors import UserError

from .control_tokens import ControlTokens, ControlTokenText
from .template_fields import declares_tools, reads_field
from .template_form import PUBLISHED, Message, ask, probe, reasoned_turns, told
from .turns import Turn, TurnReader

HistoryReasoning = Literal["template", "strip", "keep"]


@dataclass(frozen=True)
class Sample:
    """Tokens of one context and the half-open ranges [start, stop) of those that are trained on."""

    input_ids: list[int]
    target_spans: list[tuple[int, int]]


class ChatTemplate:
    """Renders conversations for training.

    Args:
        tokenizer: a tokenizer with a chat template.
        history_reasoning: what a context has of earlier reasoning. "template": what the template shows, as at
            inference. "strip": the same, but none from before the last question. "keep": all of it.
        control_tokens: what happens to control tokens inside messages. "error": the row is named. "text": they are
            encoded as ordinary text. "keep": as the tokens that they spell.
        variables: more variables for the template, such as {"thinking": True}.

    Raises:
        ValueError: the template does not show what training needs (see `template_form.probe`), or drops the reasoning
            that "keep" asks for.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        history_reasoning: HistoryReasoning = "template",
        control_tokens: ControlTokens = "error",
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer, self.variables = tokenizer, dict(variables or {})
        self.history_reasoning, self.control_tokens = history_reasoning, control_tokens
        self._form = form = probe(self._apply, [token.content for token in tokenizer.added_tokens_decoder.values()])
        if history_reasoning == "keep" and not form.keeps_history:
            raise UserError(
                "history_reasoning is 'keep', but the chat template drops the reasoning of earlier turns, so that no "
                "server would send such a context; use 'template', or a template that keeps it"
            )
        tags = [*PUBLISHED.tags, *(form.thinking.tags if form.thinking is not None else ())]
        self._controls = ControlTokenText(tokenizer, f"{tokenizer.chat_template}{form.seen}", tags)
        self._reader = TurnReader(form, self._controls, control_tokens)
        self._walls = self._find_walls()
        self._declares_tools = {system: declares_tools(self._apply, system) for system in (False, True)}
        self._reads: dict[tuple[str, str], bool] = {}

    def render(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[Sample]:
        """Samples of one valid conversation (see `rows.row_errors`); each trained turn is a target exactly once.

        Turns share a sample where the context of the later one begins with the earlier one's.

        Raises:
            Misfit: with all that does not fit.
            ValueError: the template refuses the conversation.
        """
        turns, tools = self._reader.read(messages, tools)
        samples: list[Sample] = []
        known = ""  # the text of the last sample, where its tokens are those of any text that begins so
        for index, turn in enumerate(turns):
            if not turn.trained:
                continue
            prompt = self._apply(self._history(turns[:index]), True, tools)
            target = self._target(turn, prompt, turns[index - 1].message["role"])
            if known and prompt.startswith(known):
                prompt_ids = samples[-1].input_ids + self._encode(prompt[len(known) :])
            else:
                prompt_ids = self._encode(prompt)
            target_ids = self._encode(target)
            spans = [(len(prompt_ids), len(prompt_ids) + len(target_ids))]
            if samples and prompt_ids[: len(samples[-1].input_ids)] == samples[-1].input_ids:
                spans = samples.pop().target_spans + spans
            samples.append(Sample(prompt_ids + target_ids, spans))
            known = prompt + target if prompt.endswith(self._walls) and target.endswith(self._walls) else ""
        return samples

    def declares_tools(self, messages: Sequence[Message]) -> bool:
        """Whether tools beside these messages reach the prompt."""
        return self._declares_tools[messages[0]["role"] == "system"]

    def reads(self, role: str, field: str) -> bool:
        """Whether the template looks at a field of this name, beside those of `rows.MESSAGE_FIELDS`, on such a turn."""
        if (role, field) not in self._reads:
            self._reads[role, field] = reads_field(self._apply, role, field)
        return self._reads[role, field]

    def _find_walls(self) -> tuple[str, ...]:
        """Tokens that end a prompt or a target and let nothing before them change the tokens of what follows."""
        ends = (self._form.prompt, self._form.end)
        walls = [
            token.content
            for token in self.tokenizer.added_tokens_decoder.values()
            if not (token.lstrip or token.rstrip or token.single_word)
            and any(text.endswith(token.content) for text in ends)
        ]
        text = self._form.prompt
        parted = all(
            self._encode(text + wall + rest) == self._encode(text + wall) + self._encode(rest)
            for wall in walls
            for rest in ("a", " a", "\n a")
        )
        return tuple(walls) if parted else ()

    def _history(self, turns: Sequence[Turn]) -> list[Message]:
        messages = [turn.message for turn in turns]
        if self.history_reasoning == "strip":
            last = max((index for index, message in enumerate(messages) if message["role"] == "user"), default=0)
            for index, message in enumerate(messages[:last]):
                messages[index] = {key: value for key, value in message.items() if key != "reasoning_content"}
        return messages

    def _target(self, turn: Turn, prompt: str, before: str) -> str:
        """What the model is to write behind `prompt`, which follows a message of the role `before`."""
        form, reasoning = self._form, turn.reasoning
        if not reasoning and (form.off or form.thinking is None or form.shows_reasoning):
            reasoning = None  # "", a block without text, is what the template makes of no reasoning
        body = self._body(turn.message)
        bare = form.bare["tool" if before == "tool" else "user"]
        if reasoning is None and bare is not None:
            return bare + body
        opened = form.thinking.opened_by(prompt) if form.thinking is not None else 0
        if form.thinking is None or (reasoning is None and not opened):
            raise UserError(
                f"the chat template shows an answer behind a message of the role {before!r} otherwise than behind its "
                "own generation prompt there; use the template that the model is served with"
            )
        if reasoning and not form.reasoning_verbatim:
            reasoning = self._shown_reasoning(reasoning)
        return f"{form.thinking.opening[opened:]}{reasoning or ''}{form.thinking.closing}{body}"

    def _body(self, message: Message) -> str:
        """Content, tool calls and end of turn. Calls are rendered behind a lone question: DeepSeek's template opens
        only the first calls of a conversation properly, and a model must write every one of them so."""
        if "tool_calls" not in message and self._form.content_verbatim:
            return f"{message['content']}{self._form.end}"
        alone = {key: value for key, value in message.items() if key != "reasoning_content"}
        text = self._apply(ask(alone), False)
        if not text.startswith(self._form.header) or not text.endswith(self._form.between):
            raise UserError(
                f"the chat template renders the turn in a form that cannot be told from its prompt: {text!r} does not "
                f"begin with {self._form.header!r}"
            )
        return text[len(self._form.header) : len(text) - len(self._form.between)]

    def _shown_reasoning(self, reasoning: str) -> str:
        """Reasoning as a template writes it that trims it, say."""
        assert self._form.thinking is not None
        shown = ""
        for turn in reasoned_turns(reasoning):
            shown = shown or told(self._apply(ask(turn), False), self._form.thinking)
        if not shown:
            raise UserError("the chat template does not show this reasoning_content; it cannot be a target")
        return shown

    def _apply(self, messages: list[Message], generate: bool, tools: list[Any] | None = None) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=generate, **self.variables
            )
        except TemplateError as error:
            raise UserError(f"the chat template refuses the conversation: {error}") from error
        except Exception as error:  # a template raises what Python does with the data: TypeError, KeyError, ...
            raise UserError(f"the chat template refuses the conversation: {type(error).__name__}: {error}") from error
        assert isinstance(text, str)
        return text

    def _encode(self, text: str) -> list[int]:
        """The template writes BOS itself, so no special token is added."""
        if self.control_tokens == "text":
            return self._controls.encode(text)
        ids: list[int] = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return ids
