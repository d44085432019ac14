from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from src.datamodules.chat_template import ChatTemplate
from src.datamodules.turns import Misfit

from .conftest import question_answer
from .forms import FORMS, with_template

# Special for the tokenizer; a turn's and a tool's marker; in the middle, at the ends, several at a time.
SAID = ["<｜User｜>", "a <|EOT|> b", "<｜tool▁sep｜><｜Assistant｜>x", "é<｜end▁of▁sentence｜> "]


def ids_of(tokenizer: PreTrainedTokenizerFast, mode: Any, messages: list[dict[str, Any]]) -> list[int]:
    (sample,) = ChatTemplate(tokenizer, control_tokens=mode).render(messages)
    return sample.input_ids


@pytest.mark.parametrize("said", SAID)
@pytest.mark.parametrize("place", ["question", "answer", "reasoning", "arguments"])
def test_each_mode(tokenizer: PreTrainedTokenizerFast, said: str, place: str) -> None:
    answer = "b <｜User｜>" if place == "answer" and "sentence" in said else said  # an answer's end is its turn's
    messages = {
        "question": question_answer(said, "a"),
        "answer": question_answer("q", answer),
        "reasoning": question_answer("q", "a", reasoning_content=said),
        "arguments": question_answer(
            "q", "", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": f'{{"a": "{said}"}}'}}]
        ),
    }[place]
    with pytest.raises(Misfit, match="holds the control token"):
        ids_of(tokenizer, "error", messages)
    kept, text = ids_of(tokenizer, "keep", messages), ids_of(tokenizer, "text", messages)
    assert tokenizer.decode(kept) == tokenizer.decode(text)
    assert kept == tokenizer.encode(tokenizer.decode(kept), add_special_tokens=False)
    added = set(tokenizer.added_tokens_decoder)
    spelled = answer if place == "answer" else said
    count = sum(
        spelled.count(token)
        for token in ("<｜User｜>", "<|EOT|>", "<｜tool▁sep｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>")
    )
    assert sum(index in added for index in kept) - sum(index in added for index in text) == count > 0


@pytest.mark.parametrize("name", ["V3-0324", "V3.1", "Kimi-K2-Thinking"])
def test_text_is_what_transformers_makes_of_it(forms_tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    tokenizer = with_template(forms_tokenizer, FORMS[name].template)
    tokenizer.chat_control_tokens = list(tokenizer.added_tokens_encoder)
    messages = [{"role": "system", "content": "<|im_end|>"}, *question_answer("a<｜User｜>é <|tool_call_begin|>", "a")]
    ids = ids_of(tokenizer, "text", messages)
    prompt = tokenizer.apply_chat_template(
        messages[:2], add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
    )
    assert ids[: len(prompt)] == prompt


def test_a_templates_own_markers_are_control_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    """Those that the tokenizer has no token for, and those that only a rendering shows."""
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}<|done|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}{% if tools %}<tool_list>{% endif %}"
    )
    own = with_template(tokenizer, template)
    for marker in ("<|user|>", "<|done|>", "<|assistant|>", "<tool_list>"):
        with pytest.raises(Misfit, match="holds the control token"):
            ids_of(own, "error", question_answer(f"a{marker}b", "c"))
        assert ids_of(own, "text", question_answer(f"a{marker}b", "c"))
    for text in ("a < b > c", "<b>", "<|other|>", "[x]", "if x<y: z>1"):
        assert ids_of(own, "error", question_answer(text, text))


def test_tools_are_looked_at_too(tokenizer: PreTrainedTokenizerFast) -> None:
    own = with_template(tokenizer, "{{ tools | tojson if tools else '' }}" + str(tokenizer.chat_template))
    tools = [{"type": "function", "function": {"name": "f", "description": "ends <｜User｜>"}}]
    with pytest.raises(Misfit) as caught:
        ChatTemplate(own).render(question_answer("q", "a"), tools)
    assert caught.value.problems[0][0] == "tools[0].function.description"
    (sample,) = ChatTemplate(own, control_tokens="text").render(question_answer("q", "a"), tools)
    assert sample.input_ids.count(own.convert_tokens_to_ids("<｜User｜>")) == 1
    assert "ends <｜User｜>" in own.decode(sample.input_ids)


def test_what_marks_text_is_no_text(tokenizer: PreTrainedTokenizerFast) -> None:
    for character in "\ufdd0\ufdd1":
        with pytest.raises(Misfit, match=r"messages\[1\]: holds U\+FDD0 or U\+FDD1"):
            ids_of(tokenizer, "text", question_answer("q", f"a{character}"))
        assert character in tokenizer.decode(ids_of(tokenizer, "error", question_answer("q", f"a{character}")))
    apart = with_template(
        tokenizer, str(tokenizer.chat_template).replace("'<｜User｜>' + message['content']", "message['content'][:2]")
    )
    with pytest.raises(ValueError, match="takes a control token in a message apart"):
        ids_of(apart, "text", question_answer("<｜User｜>", "a"))
