import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from src.datamodules.tokenizer import load_tokenizer

from . import forms
from .forms import with_template

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}"
    "{% for call in message['tool_calls'] %}{{ '\\n<call>' + call['function']['name'] }}</call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """DeepSeek-V3/R1's own, whose generation prompt ends at <｜Assistant｜>."""
    return load_tokenizer("deepseek")


@pytest.fixture(scope="session")
def thinking_tokenizer() -> PreTrainedTokenizerFast:
    """As R1's newer releases have it: the generation prompt opens the thinking."""
    tokenizer = load_tokenizer("deepseek")
    template = tokenizer.chat_template
    assert isinstance(template, str)
    plain = "{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜>'}}{% endif %}"
    assert plain in template
    tokenizer.chat_template = template.replace(plain, plain.replace("<｜Assistant｜>", "<｜Assistant｜><think>\\n"))
    return tokenizer


@pytest.fixture(scope="session")
def forms_tokenizer() -> PreTrainedTokenizerFast:
    """DeepSeek's with the tokens of all `forms.FORMS`; for `with_template`."""
    return forms.forms_tokenizer()


@pytest.fixture(scope="session")
def chatml_tokenizer(forms_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Another model's: other turns, no BOS, content trimmed, a line break behind the end of turn, no thinking."""
    return with_template(forms_tokenizer, CHATML)


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., str]:
    def write(name: str, *conversations: list[dict[str, Any]]) -> str:
        path = tmp_path / name
        rows = [json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in conversations]
        path.write_text("".join(rows), encoding="utf-8")
        return str(path)

    return write


def question_answer(question: str, answer: str, **fields: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **fields}]
