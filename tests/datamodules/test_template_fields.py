"""Templates in the forms that published ones have, in our own words."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from src.datamodules.cache import open_or_build
from src.datamodules.chat_template import ChatTemplate
from src.datamodules.rows import RowError
from src.datamodules.tokenization import TokenizeOptions
from src.datamodules.tokenizer import load_tokenizer

from .conftest import question_answer

TURNS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}"
    "{% if m.get('name') and m['role'] != 'assistant' %} {{ m['name'] }}{% endif %}{{ '\\n' + m['content'] }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
)
DUMPED = "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>{% endif %}"
LISTED = "{% for tool in tools or [] %}<|im_start|>tool\n{{ tool.function.name }}<|im_end|>{% endfor %}"
WITH_SYSTEM = "{% if tools and messages[0]['role'] == 'system' %}<|im_start|>{{ tools | tojson }}<|im_end|>{% endif %}"
RAISES = "{% if tools %}{{ raise_exception('no tools') }}{% endif %}"
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def template(text: str) -> ChatTemplate:
    tokenizer = load_tokenizer("deepseek")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = text
    return ChatTemplate(tokenizer)


@pytest.mark.parametrize("declared", [DUMPED, LISTED])
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "s"}]])
def test_tools_reach_a_template_that_declares_them(declared: str, system: list[dict[str, Any]]) -> None:
    chats = template(declared + TURNS)
    messages = [*system, *question_answer("q", "a")]
    (sample,) = chats.render(messages, TOOLS)
    (start, _), *_ = sample.target_spans
    prompt = chats.tokenizer.apply_chat_template(messages[:-1], tools=TOOLS, tokenize=False, add_generation_prompt=True)
    assert chats.tokenizer.decode(sample.input_ids[:start]) == prompt and "weather" in prompt
    assert chats.render(messages) != [sample]


@pytest.mark.parametrize(
    ("text", "alone", "with_system"),
    [
        (TURNS, False, False),
        (RAISES + TURNS, False, False),
        (WITH_SYSTEM + TURNS, False, True),
        (DUMPED + TURNS, True, True),
        (LISTED + TURNS, True, True),
    ],
)
def test_whether_tools_reach_the_prompt(text: str, alone: bool, with_system: bool) -> None:
    chats, messages = template(text), question_answer("q", "a")
    assert chats.declares_tools(messages) == alone
    assert chats.declares_tools([{"role": "system", "content": "s"}, *messages]) == with_system


def test_tools_are_an_error_where_the_template_leaves_them_out(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """As DeepSeek's does."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": question_answer("q", "a"), "tools": TOOLS}))
    with pytest.raises(RowError, match=r"a\.jsonl:1: tools: is given, but the chat template does not write tools"):
        open_or_build([str(path)], tokenizer, TokenizeOptions(64), tmp_path)
    assert len(open_or_build([str(path)], tokenizer, TokenizeOptions(64, fields={"tools": None}), tmp_path)) == 1
    (sample,) = (chats := template(DUMPED + TURNS)).render(question_answer("q", "a"), TOOLS)
    cache = open_or_build([str(path)], chats.tokenizer, TokenizeOptions(64), tmp_path)
    assert cache.document(0).input_ids.tolist() == sample.input_ids


def test_a_field_is_read_on_the_turns_on_which_it_changes_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    chats = template(TURNS)
    assert [role for role in ("system", "user", "assistant", "tool") if chats.reads(role, "name")] == [
        "system",
        "user",
        "tool",
    ]
    assert not chats.reads("user", "colour")
    assert not ChatTemplate(tokenizer).reads("user", "name")  # though the template has function.name
