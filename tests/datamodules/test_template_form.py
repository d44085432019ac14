import copy
from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from src.datamodules.chat_template import ChatTemplate
from src.datamodules.template_form import Form, Message, Thinking, probe

from .conftest import question_answer
from .forms import FORMS, with_template


def form_of(tokenizer: PreTrainedTokenizerFast, template: str, **variables: Any) -> Form:
    tokenizer = with_template(tokenizer, template)

    def apply(messages: list[Message], generate: bool) -> str:
        try:
            return str(
                tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate, **variables)
            )
        except Exception as error:
            raise ValueError(str(error)) from error

    return probe(apply, [token.content for token in tokenizer.added_tokens_decoder.values()])


@pytest.mark.parametrize("name", FORMS)
def test_each_form_is_found(forms_tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    known = FORMS[name]
    form = form_of(forms_tokenizer, known.template, **known.variables)
    assert (form.thinking, form.bare["user"], form.bare["tool"]) == (known.thinking, *known.bare)
    assert (form.off, form.keeps_history) == (known.off, known.keeps)
    assert (form.content_verbatim, form.reasoning_verbatim) == (not known.trims, not known.trims_reasoning)
    chatml = "<|im_end|>\n" in known.template or "<|im_end|>\\n" in known.template
    assert (form.end, form.between) == ("<|im_end|>" if "<|im_end|>" in known.template else "<｜end▁of▁sentence｜>",
                                        "\n" if chatml else "")  # fmt: skip


@pytest.mark.parametrize(
    ("name", "contexts_and_targets"),
    [
        (
            "R1",
            [
                ("{B}<｜User｜>1<｜Assistant｜><think>\n", "r1\n</think>\n\na1{E}"),
                ("{B}<｜User｜>1<｜Assistant｜>a1{E}<｜User｜>2<｜Assistant｜><think>\n", "\n</think>\n\na2{E}"),
            ],
        ),
        (
            "V3-0324",
            [
                ("{B}<｜User｜>1<｜Assistant｜>", "<think>\nr1\n</think>\n\na1{E}"),
                ("{B}<｜User｜>1<｜Assistant｜>a1{E}<｜User｜>2<｜Assistant｜>", "a2{E}"),
            ],
        ),
        (
            "V3.1 thinking",
            [
                ("{B}<｜User｜>1<｜Assistant｜><think>", "r1</think>a1{E}"),
                ("{B}<｜User｜>1<｜Assistant｜></think>a1{E}<｜User｜>2<｜Assistant｜><think>", "</think>a2{E}"),
            ],
        ),
        (
            "Kimi-K2-Thinking",
            [
                ("{K}<|im_user|>user<|im_middle|>1<|im_end|>{A}", "<think>r1</think>a1<|im_end|>"),
                (
                    "{K}<|im_user|>user<|im_middle|>1<|im_end|>{A}<think></think>a1<|im_end|>"
                    "<|im_user|>user<|im_middle|>2<|im_end|>{A}",
                    "<think></think>a2<|im_end|>",
                ),
            ],
        ),
    ],
)
def test_what_is_trained_spelled_out(
    forms_tokenizer: PreTrainedTokenizerFast, name: str, contexts_and_targets: list[tuple[str, str]]
) -> None:
    template = ChatTemplate(with_template(forms_tokenizer, FORMS[name].template), variables=FORMS[name].variables)
    turns = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "a1", "reasoning_content": "r1"},
        {"role": "user", "content": "2"},
        {"role": "assistant", "content": "a2"},
    ]
    parts = {
        "B": "<｜begin▁of▁sentence｜>",
        "E": "<｜end▁of▁sentence｜>",
        "K": "<|im_system|>system<|im_middle|>You are Kimi.<|im_end|>",
        "A": "<|im_assistant|>assistant<|im_middle|>",
    }
    decode: Callable[..., str] = forms_tokenizer.decode
    assert [
        (decode(sample.input_ids[:start]), decode(sample.input_ids[start:stop]))
        for sample in template.render(turns)
        for start, stop in sample.target_spans
    ] == [(context.format(**parts), target.format(**parts)) for context, target in contexts_and_targets]


PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (PLAIN + "{% if add_generation_prompt %}<assistant><think>{% endif %}", "opens '<think>', and nothing in it"),
        (PLAIN + "{% if add_generation_prompt %}<answer>{% endif %}", "does not tell how a model answers: .*<answer>"),
        (PLAIN + "{% if add_generation_prompt %}Answer:{% endif %}", "'Answer:', but '<assistant>' precedes an"),
        (
            PLAIN.replace("<|im_end|>", "{{ m.reasoning_content or '' }}<|im_end|>")
            + "{% if add_generation_prompt %}<assistant>{% endif %}",
            "shows reasoning_content, but not before the answer and between an opening and a closing tag",
        ),
        (
            PLAIN.replace("{{ m.content }}", "{{ m.reasoning_content or '' }}{{ m.content }}")
            + "{% if add_generation_prompt %}<assistant>{% endif %}",
            "shows reasoning_content, but not before the answer",
        ),
        ("{{ messages | length }}" + PLAIN, "changes the text before an assistant turn"),
        (PLAIN.replace("<|im_end|>", ""), "does not show an assistant turn's content followed by an end of turn"),
    ],
)  # fmt: skip
def test_a_template_that_does_not_tell_is_refused(
    forms_tokenizer: PreTrainedTokenizerFast, template: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        form_of(forms_tokenizer, template)


def test_a_prompt_may_differ_from_history_in_space(forms_tokenizer: PreTrainedTokenizerFast) -> None:
    template = PLAIN + "{% if add_generation_prompt %}{{ '<assistant>\\n' }}{% endif %}"
    (sample,) = ChatTemplate(with_template(forms_tokenizer, template)).render(question_answer("q", "a"))
    assert forms_tokenizer.decode(sample.input_ids) == "<user>q<|im_end|><assistant>\na<|im_end|>"


def test_how_much_of_the_thinking_a_prompt_opens() -> None:
    thinking = Thinking("\n<think>\n", "\n</think>\n\n")
    assert thinking.tags == ("<think>", "</think>")
    prompts = {"": 0, "<": 0, "a<think>\n": 0, "\n<think": 0, "a\n<think>": 8, "a\n<think>\n": 9, "\n<think>\n\n": 0}
    assert {prompt: thinking.opened_by(prompt) for prompt in prompts} == prompts


def test_probes_leave_the_tokenizer_alone(forms_tokenizer: PreTrainedTokenizerFast) -> None:
    before = copy.copy(forms_tokenizer.chat_template)
    ChatTemplate(forms_tokenizer)
    assert forms_tokenizer.chat_template == before
