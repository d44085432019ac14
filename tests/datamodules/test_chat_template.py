from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from src.datamodules.chat_template import ChatTemplate, HistoryReasoning, Sample

from .conftest import question_answer
from .forms import FORMS, with_template
from .fuzz import fuzz

EOS = "<｜end▁of▁sentence｜>"
CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>{0}\n```json\n{1}\n```<｜tool▁call▁end｜>"
    "<｜tool▁calls▁end｜>"
)

texts = st.text(alphabet="ab 9.\n你好谁？éß,", max_size=10).map(lambda text: text.lstrip("\n"))
questions = texts.filter(str.strip)
some_text = st.text(alphabet="xy 7你好\n", min_size=1, max_size=8).map(
    lambda text: f"a{text}b"
)  # no edge is the form's
losses = st.sampled_from([{}, {}, {"loss": True}, {"loss": False}])
reasonings: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({}), some_text.map(lambda text: {"reasoning_content": text})
)


@st.composite
def conversations(draw: st.DrawFn, tools: bool = True, thinking: bool = True) -> list[dict[str, Any]]:
    reasoning = reasonings if thinking else st.just({})
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(texts)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(questions)})
        for _ in range(draw(st.integers(0, 2)) if tools else 0):
            function = {"name": draw(st.sampled_from(["search", "查询"])), "arguments": '{"q": 1}'}
            call = {
                "role": "assistant",
                "content": draw(texts),
                "tool_calls": [{"type": "function", "function": function}],
            }
            messages.append(call | draw(reasoning) | draw(losses))
            messages += [{"role": "tool", "content": draw(texts)}] * draw(st.integers(1, 2))
        messages.append({"role": "assistant", "content": draw(texts)} | draw(reasoning) | draw(losses))
    return messages


def trained(messages: list[dict[str, Any]]) -> list[int]:
    return [i for i, turn in enumerate(messages) if turn["role"] == "assistant" and turn.get("loss") is not False]


def spans(samples: list[Sample]) -> list[tuple[list[int], int, int]]:
    return [(sample.input_ids, start, stop) for sample in samples for start, stop in sample.target_spans]


def prompt_ids(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]]) -> list[int]:
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert isinstance(ids, list)
    return ids


def answer_of(turn: dict[str, Any]) -> str:
    calls = "".join(CALL.format(*call["function"].values()) for call in turn.get("tool_calls", []))
    return f"{turn['content']}{calls}{EOS}"


def merged(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same conversation in the guide's format, thinking merged into the content."""
    result = []
    for turn in messages:
        turn = dict(turn)
        if reasoning := turn.pop("reasoning_content", None):
            turn["content"] = f"<think>\n{reasoning}\n</think>\n\n{turn['content']}"
        result.append(turn)
    return result


fast = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fast
@given(messages=conversations())
def test_every_prompt_is_the_templates_own_and_every_target_the_assistants(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]]
) -> None:
    samples = ChatTemplate(tokenizer).render(messages)
    found = spans(samples)
    assert len(found) == len(trained(messages))
    for (ids, start, stop), index in zip(found, trained(messages), strict=True):
        turn = messages[index]
        assert ids[:start] == prompt_ids(tokenizer, messages[:index])
        think = f"<think>\n{turn['reasoning_content']}\n</think>\n\n" if "reasoning_content" in turn else ""
        assert ids[start:stop] == tokenizer.encode(think + answer_of(turn), add_special_tokens=False)
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert all(sample.target_spans[-1][1] == len(sample.input_ids) for sample in samples)


@fast
@given(messages=conversations())
def test_both_reasoning_formats_give_the_same_tokens(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]]
) -> None:
    for history in ("template", "strip"):
        template = ChatTemplate(tokenizer, history)
        assert template.render(merged(messages)) == template.render(messages)


@fast
@given(messages=conversations())
def test_thinking_that_the_generation_prompt_opens_is_no_target(
    thinking_tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]]
) -> None:
    found = spans(ChatTemplate(thinking_tokenizer).render(messages))
    for (ids, start, stop), index in zip(found, trained(messages), strict=True):
        turn = messages[index]
        assert ids[:start] == prompt_ids(thinking_tokenizer, messages[:index])
        reasoning, answer = turn.get("reasoning_content"), answer_of(turn)
        if messages[index - 1]["role"] == "tool":  # the template writes no generation prompt behind tool outputs
            expected = answer if reasoning is None else f"<think>\n{reasoning}\n</think>\n\n{answer}"
        else:
            expected = f"{reasoning or ''}\n</think>\n\n{answer}"
        assert ids[start:stop] == thinking_tokenizer.encode(expected, add_special_tokens=False)


@fast
@given(messages=conversations(thinking=False))
def test_another_models_template(chatml_tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]]) -> None:
    found = spans(ChatTemplate(chatml_tokenizer).render(messages))
    for (ids, start, stop), index in zip(found, trained(messages), strict=True):
        turn = messages[index]
        assert ids[:start] == prompt_ids(chatml_tokenizer, messages[:index])
        # As the template has it, trimmed, and without the line break behind the end of turn.
        calls = "".join(f"\n<call>{call['function']['name']}</call>" for call in turn.get("tool_calls", []))
        assert chatml_tokenizer.decode(ids[start:stop]) == f"{turn['content'].strip()}{calls}<|im_end|>"


@fast
@given(messages=conversations(tools=False))
def test_keep_is_one_sample_with_all_reasoning(
    forms_tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]]
) -> None:
    keeping = with_template(forms_tokenizer, FORMS["always kept, other tags"].template)
    samples = ChatTemplate(keeping, "keep").render(messages)
    if not trained(messages):
        assert samples == []
        return
    (sample,) = samples
    assert ChatTemplate(keeping).render(messages) == samples
    last = trained(messages)[-1]
    whole = keeping.apply_chat_template(messages[: last + 1], tokenize=False)
    assert f"{keeping.decode(sample.input_ids)}\n" == whole
    for (start, stop), index in zip(sample.target_spans, trained(messages), strict=True):
        assert keeping.decode(sample.input_ids[start:stop]).endswith(messages[index]["content"].strip() + "<|im_end|>")


def test_a_conversation_is_split_only_where_contexts_differ(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "2"},
        {"role": "assistant", "content": "two", "reasoning_content": "so"},
        {"role": "user", "content": "3"},
        {"role": "assistant", "content": "three"},
    ]
    samples = ChatTemplate(tokenizer).render(turns)
    assert [len(sample.target_spans) for sample in samples] == [2, 1]
    assert "so" in tokenizer.decode(samples[0].input_ids) and "so" not in tokenizer.decode(samples[1].input_ids)


def test_each_tool_call_is_a_well_formed_target(tokenizer: PreTrainedTokenizerFast) -> None:
    """DeepSeek's template opens only a conversation's first calls properly: fine for history, wrong as a target."""
    call = {"function": {"name": "f", "arguments": "{}"}}
    rounds: list[dict[str, Any]] = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "42"},
    ] * 2
    found = spans(ChatTemplate(tokenizer).render([{"role": "user", "content": "?"}, *rounds]))
    assert [tokenizer.decode(ids[start:stop]) for ids, start, stop in found] == [CALL.format("f", "{}") + EOS] * 2


def test_absent_and_null_are_the_same(tokenizer: PreTrainedTokenizerFast) -> None:
    question = {"role": "user", "content": "?"}
    nulls = {"reasoning_content": None, "loss": None, "tool_calls": None, "name": None}
    template = ChatTemplate(tokenizer)
    expected = template.render([question, {"role": "assistant", "content": ""}])
    assert template.render([question | nulls, {"role": "assistant", "content": None} | nulls]) == expected
    empty: dict[str, Any] = {"role": "assistant", "content": None, "reasoning_content": "", "tool_calls": []}
    assert template.render([question, empty]) == expected


def test_an_empty_thinking_block_is_trained_as_written(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "<think>\n\n</think>\n\nyes"
    (sample,) = ChatTemplate(tokenizer).render(
        [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]
    )
    (start, stop), *_ = sample.target_spans
    assert tokenizer.decode(sample.input_ids[start:stop]) == text + EOS


def test_what_is_kept_of_earlier_reasoning(forms_tokenizer: PreTrainedTokenizerFast) -> None:
    """By the template, or none of what stands before the last question; what a template drops cannot be kept."""
    call = {"id": "f:0", "function": {"name": "f", "arguments": "{}"}}
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "one", "reasoning_content": "first"},
        {"role": "user", "content": "2"},
        {"role": "assistant", "content": "", "reasoning_content": "second", "tool_calls": [call], "loss": False},
        {"role": "tool", "content": "out", "tool_call_id": "f:0"},
        {"role": "assistant", "content": "two", "reasoning_content": "third"},
    ]
    kept: dict[tuple[str, HistoryReasoning], list[str]] = {
        ("R1", "template"): [],
        ("Kimi-K2-Thinking", "template"): ["second"],
        ("Kimi-K2-Thinking", "strip"): ["second"],
        ("always kept, other tags", "template"): ["first", "second"],
        ("always kept, other tags", "strip"): ["second"],
        ("always kept, other tags", "keep"): ["first", "second"],
    }
    for (name, history), expected in kept.items():
        tokenizer = with_template(forms_tokenizer, FORMS[name].template)
        ids, start, _ = spans(ChatTemplate(tokenizer, history).render(turns))[-1]
        context = tokenizer.decode(ids[:start])
        assert [word for word in ("first", "second", "third") if word in context] == expected, (name, history)
    for name in ("V3-0324", "R1", "V3.1", "Kimi-K2-Instruct", "Kimi-K2-Thinking"):
        with pytest.raises(ValueError, match="'keep', but the chat template drops the reasoning of earlier turns"):
            ChatTemplate(with_template(forms_tokenizer, FORMS[name].template), "keep")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "V3.1",
            r"messages\[1\]\.{field}: is reasoning, but .* \(thinking is off\); remove it, or let the template think",
        ),
        ("Moonlight", r"messages\[1\]\.{field}: is reasoning, but .* neither shows reasoning_content nor cuts <think>"),
        ("Kimi-K2-Instruct", r"messages\[1\]\.{field}: is reasoning, but the chat template does not tell how"),
    ],
)
def test_reasoning_without_a_place_is_refused(
    forms_tokenizer: PreTrainedTokenizerFast, name: str, message: str
) -> None:
    template = ChatTemplate(with_template(forms_tokenizer, FORMS[name].template))
    question: dict[str, Any] = {"role": "user", "content": "?"}
    thought: dict[str, Any] = {"role": "assistant", "content": "a", "reasoning_content": "r"}
    merged = {"role": "assistant", "content": "<think>\nr\n</think>\n\na"}
    for turn, field in ((thought, "reasoning_content"), (merged, "content")):
        with pytest.raises(ValueError, match=message.format(field=field)):
            template.render([question, turn])
        # As context its thinking is what a server would not send either.
        rest = [question, {"role": "assistant", "content": "b"}]
        plain = [question, {"role": "assistant", "content": "a", "loss": False}, *rest]
        assert template.render([question, turn | {"loss": False}, *rest]) == template.render(plain)
    for empty in ({**thought, "reasoning_content": "\n\n"}, {**merged, "content": "<think>\n\n</think>\n\na"}):
        assert template.render([question, empty]) == template.render([question, thought | {"reasoning_content": None}])


@pytest.mark.parametrize("name", FORMS)
def test_samples_are_the_templates_rendering(
    forms_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str
) -> None:
    """Contexts and targets by transformers alone, sound and mutated rows (see `fuzz`, a script for many more)."""
    ends, wrong = fuzz(40, 7, forms_tokenizer, tmp_path, forms={name: FORMS[name]})
    assert not wrong, "\n".join(wrong)
    assert min(ends["tokens"], ends["named"]) > 5


def test_joined_and_whole_encodings_are_the_same(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A context that continues the last sample is not encoded again from its start."""
    turns = [*question_answer("1", "one"), *question_answer(" 2", "two"), *question_answer("\n3", " \n")]
    template = ChatTemplate(tokenizer)
    encoded: list[str] = []
    encode = template._encode

    def recorded(text: str) -> list[int]:
        encoded.append(text)
        return encode(text)

    monkeypatch.setattr(template, "_encode", recorded)
    (sample,) = template.render(turns)
    assert "".join(encoded) == tokenizer.decode(sample.input_ids)
    assert sample.input_ids == tokenizer.encode("".join(encoded), add_special_tokens=False)


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        ("{{ messages[0]['content'] }}", "does not show an assistant turn's content"),
        ("{{ raise_exception('roles must alternate') }}", "refuses the conversation: roles must alternate"),
        ("{{ messages[0]['content'] + 1 }}", "refuses the conversation: TypeError: can only concatenate str"),
    ],
)
def test_a_template_that_cannot_serve(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, chat_template: str, message: str
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", chat_template)
    with pytest.raises(ValueError, match=message):
        ChatTemplate(tokenizer)
