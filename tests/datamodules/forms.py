"""Chat templates in the forms that models of this architecture have, written for the tests, and what each form is."""

import copy
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerFast

from src.datamodules.template_form import PUBLISHED, Thinking
from src.datamodules.tokenizer import load_tokenizer

MOONSHOT_TOKENS = [f"<|im_{name}|>" for name in ("user", "assistant", "system", "middle", "end", "start")] + [
    f"<|tool_call{name}|>" for name in ("s_section_begin", "s_section_end", "_begin", "_argument_begin", "_end")
]

_CALL_V3 = "function<｜tool▁sep｜>{{ c.function.name }}\n```json\n{{ c.function.arguments }}\n```"
_CALL_V31 = "{{ c.function.name }}<｜tool▁sep｜>{{ c.function.arguments }}"


def _deepseek(call: str, user: str, answer: str, generation: str) -> str:
    """DeepSeek's: system text first, no generation prompt behind tool outputs, which share one block in V3 and R1.

    `user`: what follows a question; `answer`: what stands before the first answer to one; `generation`: the prompt.
    """
    block = call is _CALL_V3
    begin, end = ("<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>") if block else ("", "")
    return (
        "{%- set s = namespace(output=false, asked=false) -%}{{- bos_token -}}"
        "{%- for m in messages if m.role == 'system' -%}{{- m.content -}}{%- endfor -%}"
        "{%- for m in messages -%}"
        "{%- if m.role == 'user' -%}{%- set s.asked = true -%}"
        f"{{{{- '<｜User｜>' + m.content + '{user}' -}}}}"
        "{%- elif m.role == 'tool' -%}"
        f"{{{{- ('' if s.output else '{begin}') + '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' -}}}}"
        "{%- set s.output = true -%}"
        "{%- elif m.role == 'assistant' -%}"
        f"{{%- if s.output -%}}{{{{- '{end}' -}}}}{{%- elif s.asked -%}}{{{{- '{answer}' -}}}}{{%- endif -%}}"
        "{%- set s.output = false -%}{%- set s.asked = false -%}"
        "{{- m.content.split('</think>')[-1] -}}"
        "{%- for c in m.tool_calls or [] -%}"
        f"{{{{- '<｜tool▁calls▁begin｜>' if loop.first -}}}}<｜tool▁call▁begin｜>{call}<｜tool▁call▁end｜>"
        "{{- '<｜tool▁calls▁end｜>' if loop.last -}}{%- endfor -%}{{- eos_token -}}"
        "{%- endif -%}{%- endfor -%}"
        f"{{%- if s.output -%}}{{{{- '{end}' -}}}}{{%- endif -%}}"
        f"{{%- if add_generation_prompt and s.asked -%}}{{{{- {generation} -}}}}{{%- endif -%}}"
    )


_MOONSHOT_CALLS = (
    "{%- for c in m.tool_calls or [] -%}{{- '<|tool_calls_section_begin|>' if loop.first -}}"
    "<|tool_call_begin|>{{ c.id }}<|tool_call_argument_begin|>{{ c.function.arguments }}<|tool_call_end|>"
    "{{- '<|tool_calls_section_end|>' if loop.last -}}{%- endfor -%}"
)


def _moonshot(assistant: str, system: str = "") -> str:
    """Moonlight's and Kimi-K2's: a token for each role, its name, <|im_middle|>, the content, <|im_end|>."""
    default = f"<|im_system|>system<|im_middle|>{system}<|im_end|>"
    return (
        "{%- set s = namespace(last=-1) -%}"
        "{%- for m in messages -%}{%- if m.role == 'assistant' and not m.tool_calls -%}{%- set s.last = loop.index0 -%}"
        "{%- endif -%}{%- endfor -%}"
        f"{{%- if messages[0].role != 'system' -%}}{{{{- '{default}' -}}}}{{%- endif -%}}"
        "{%- for m in messages -%}"
        "{%- if m.role == 'assistant' -%}<|im_assistant|>assistant<|im_middle|>"
        + assistant
        + "{%- elif m.role == 'user' -%}<|im_user|>user<|im_middle|>{{ m.content }}"
        "{%- elif m.role == 'tool' -%}<|im_system|>tool<|im_middle|>"
        "{{ '## Return of ' + m.tool_call_id + '\\n' + m.content }}"
        "{%- else -%}<|im_system|>system<|im_middle|>{{ m.content }}{%- endif -%}<|im_end|>{%- endfor -%}"
        "{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}"
    )


def _qwen(reasoning: str, generation: str = "") -> str:
    """Line breaks around the tags, both trimmed, a line break behind the end of turn."""
    return (
        "{%- set s = namespace(last=-1) -%}"
        "{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set s.last = loop.index0 -%}"
        "{%- endif -%}{%- endfor -%}"
        "{%- for m in messages -%}{{- '<|im_start|>' + ('user' if m.role == 'tool' else m.role) + '\\n' -}}"
        "{%- if m.role == 'assistant' -%}" + reasoning + "{{- m.content | trim -}}"
        "{%- for c in m.tool_calls or [] -%}"
        "{{- '\\n<tool_call>' + c.function.name + ' ' + c.function.arguments + '</tool_call>' -}}{%- endfor -%}"
        "{%- elif m.role == 'tool' -%}{{- '<tool_response>' + m.content + '</tool_response>' -}}"
        "{%- else -%}{{- m.content -}}{%- endif -%}{{- '<|im_end|>\\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' + '" + generation + "' -}}{%- endif -%}"
    )


_THINK_TRIMMED = "{{- '<think>\\n' + (m.reasoning_content or '') | trim + '\\n</think>\\n\\n' -}}"


def forms_tokenizer() -> PreTrainedTokenizerFast:
    """DeepSeek's tokenizer with the turn tokens of all forms."""
    tokenizer = load_tokenizer("deepseek")
    tokenizer.add_special_tokens({"additional_special_tokens": MOONSHOT_TOKENS})
    return tokenizer


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


@dataclass(frozen=True)
class Known:
    """`bare`: before an answer without reasoning, behind a question and behind a tool's output."""

    template: str
    thinking: Thinking | None
    bare: tuple[str | None, str | None] = ("", "")
    off: bool = False
    keeps: bool = False
    trims: bool = False
    trims_reasoning: bool = False
    variables: dict[str, Any] = field(default_factory=dict)


_V31 = _deepseek(
    _CALL_V31, "", "<｜Assistant｜></think>", "'<｜Assistant｜>' + ('<think>' if thinking else '</think>')"
)
PLAIN_TAGS = Thinking("<think>", "</think>")

FORMS = {
    "V3-0324": Known(_deepseek(_CALL_V3, "<｜Assistant｜>", "", "''"), PUBLISHED),
    "R1": Known(_deepseek(_CALL_V3, "", "<｜Assistant｜>", r"'<｜Assistant｜><think>\n'"), PUBLISHED, (None, "")),
    "R1-0528": Known(_deepseek(_CALL_V3, "", "<｜Assistant｜>", "'<｜Assistant｜>'"), PUBLISHED),
    "V3.1": Known(_V31, None, off=True),
    "V3.1 thinking": Known(_V31, PLAIN_TAGS, (None, ""), variables={"thinking": True}),
    "Moonlight": Known(_moonshot("{{- m.content -}}", "You are helpful."), None),
    "Kimi-K2-Instruct": Known(_moonshot("{{- m.content -}}" + _MOONSHOT_CALLS, "You are Kimi."), None),
    "Kimi-K2-Thinking": Known(
        _moonshot(
            "<think>{{- m.reasoning_content if loop.index0 > s.last and m.reasoning_content else '' -}}</think>"
            "{{- m.content -}}" + _MOONSHOT_CALLS,
            "You are Kimi.",
        ),
        PLAIN_TAGS,
        ("<think></think>", "<think></think>"),
    ),
    "kept in the last turn, trimmed": Known(
        _qwen(f"{{%- if loop.index0 > s.last -%}}{_THINK_TRIMMED}{{%- endif -%}}"),
        PUBLISHED,
        ("<think>\n\n</think>\n\n",) * 2,
        trims=True,
        trims_reasoning=True,
    ),
    "always kept, opened by the prompt": Known(
        _qwen(_THINK_TRIMMED, r"<think>\n"),
        PUBLISHED,
        ("\n</think>\n\n",) * 2,
        keeps=True,
        trims=True,
        trims_reasoning=True,
    ),
    "always kept, other tags": Known(
        _qwen("{%- if m.reasoning_content -%}{{- '◁think▷' + m.reasoning_content + '◁/think▷' -}}{%- endif -%}"),
        Thinking("◁think▷", "◁/think▷"),
        keeps=True,
        trims=True,
    ),
}
