from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from src.datamodules.cache import open_or_build, open_or_check
from src.datamodules.chat_template import ChatTemplate
from src.datamodules.rows import RowError
from src.datamodules.tokenization import TokenizeOptions
from src.datamodules.turns import Misfit

from .conftest import question_answer
from .forms import FORMS, with_template

EOS = "<｜end▁of▁sentence｜>"
QUESTION, ANSWER, REASONING = "messages[0].content", "messages[1].content", "messages[1].reasoning_content"
ARGUMENTS = "messages[1].tool_calls[0].function.arguments"
THOUGHT = question_answer("q", "a", reasoning_content="r")


@pytest.fixture(
    scope="module", params=["V3-0324", "R1", "V3.1 thinking", "Kimi-K2-Thinking", "always kept, other tags"]
)
def template(request: pytest.FixtureRequest, forms_tokenizer: PreTrainedTokenizerFast) -> ChatTemplate:
    known = FORMS[request.param]
    return ChatTemplate(with_template(forms_tokenizer, known.template), variables=known.variables)


@pytest.mark.parametrize(
    "fields",
    [
        {"content": "<think>\nr\n</think>\n\na"},
        {"content": " \n<think>r</think>a"},
        {"content": "r\n</think>\n\na"},  # the prompt had the opening tag
        {"content": "\nr</think>a"},
        {"content": "\n\na", "reasoning_content": "\nr\n"},  # as a server's parser leaves them
        {"content": "\r\na", "reasoning_content": "r\r\n"},
    ],
)
def test_every_spelling_of_thinking_is_one_form(template: ChatTemplate, fields: dict[str, str]) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", **fields}, *question_answer("2", "b")]
    assert template.render(turns) == template.render([*THOUGHT, *question_answer("2", "b")])


@pytest.mark.parametrize("end", [EOS, EOS * 2, f"{EOS}\n", f" {EOS}"])
def test_an_answer_has_one_end_of_turn(tokenizer: PreTrainedTokenizerFast, end: str) -> None:
    template = ChatTemplate(tokenizer)

    def turns(end: str) -> list[dict[str, Any]]:
        context = question_answer("2", f"b{end}", loss=False)
        return [*question_answer("q", f"a{end}"), *context, *question_answer("3", f"c{end}")]

    assert template.render(turns(end)) == template.render(turns(end.partition(EOS)[0]))


def test_a_tags_own_spelling_is_read_beside_the_common_one(forms_tokenizer: PreTrainedTokenizerFast) -> None:
    template = ChatTemplate(with_template(forms_tokenizer, FORMS["always kept, other tags"].template))
    assert template.render(question_answer("q", "◁think▷r◁/think▷a")) == template.render(THOUGHT)
    assert template.render(question_answer("q", "r◁/think▷a")) == template.render(THOUGHT)


def call(arguments: Any) -> dict[str, Any]:
    return {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}]}


@pytest.mark.parametrize(
    ("turns", "field", "problem"),
    [
        (question_answer("q", "<think>r"), ANSWER, "opens thinking with <think> and never closes it"),
        (question_answer("q", "a <think> b"), ANSWER, "never closes it"),
        (question_answer("q", "a <think>r</think>b"), ANSWER, "has thinking tags elsewhere than around"),
        (question_answer("q", "<think>r</think>a</think>"), ANSWER, "has thinking tags elsewhere"),
        (question_answer("q", "<think>a<think>b</think>c"), ANSWER, "has thinking tags elsewhere"),
        (question_answer("q", "r</think>a", reasoning_content="r"), REASONING, "beside"),
        (question_answer("q", "a", reasoning_content="<think>r"), REASONING, "without its tags"),
        (question_answer("", "a"), QUESTION, "is ''; a question needs text"),
        (question_answer(" \n", "a"), QUESTION, r"is ' \n'; a question needs text"),
        ([{"role": "user", "content": None}, *question_answer("", "a")[1:]], QUESTION, "is null; a"),
        (question_answer("q", "a<｜User｜>b"), ANSWER, "the control token '<｜User｜>'; remove it"),
        (question_answer("<｜begin▁of▁sentence｜>q", "a"), QUESTION, "control token '<｜begin▁of▁sentence｜>'"),
        (question_answer("q", f"a{EOS}b"), ANSWER, f"holds the control token '{EOS}'"),
        (question_answer("q", "a", reasoning_content=f"r{EOS}"), REASONING, "control token"),
        (question_answer("q", f"<think>{EOS}</think>a"), ANSWER, "control token"),
        (question_answer("q", "", **call("{'a': 1}")), ARGUMENTS, "no JSON object"),
        (question_answer("q", "", **call('{"a": ')), ARGUMENTS, "no JSON object"),
        (question_answer("q", "", **call("")), ARGUMENTS, "no JSON object"),
        (question_answer("q", "", **call('{} "x"')), ARGUMENTS, "Extra data"),
        (question_answer("q", "", **call('["a"]')), ARGUMENTS, "it is no object"),
        (question_answer("q", "", **call('{"a": NaN}')), ARGUMENTS, "NaN is no JSON"),
        (question_answer("q", "", **call("[" * 9999)), ARGUMENTS, "recursion"),
        (question_answer("q", "", **call('{"a": "<｜tool▁sep｜>"}')), ARGUMENTS, "control"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(
    tokenizer: PreTrainedTokenizerFast, turns: list[dict[str, Any]], field: str, problem: str
) -> None:
    with pytest.raises(Misfit) as caught:
        ChatTemplate(tokenizer).render(turns)
    ((found, said),) = caught.value.problems
    assert found == field and problem in said


@pytest.mark.parametrize(
    "arguments", ["{}", ' {"a": {"b": [1, null]}} ', '{"n": 1' + "0" * 5000 + "}", '{"t": "\\ud800"}']
)
def test_arguments_keep_their_spelling(tokenizer: PreTrainedTokenizerFast, arguments: str) -> None:
    (sample,) = ChatTemplate(tokenizer).render(question_answer("q", "", **call(arguments)))
    assert arguments in tokenizer.decode(sample.input_ids)


def test_thinking_tags_that_others_say_are_text(tokenizer: PreTrainedTokenizerFast) -> None:
    """What a server would send; the tokenizer makes tokens of them there too."""
    (sample,) = ChatTemplate(tokenizer).render(question_answer("Why </think> or <think>?", "a"))
    assert "Why </think> or <think>?" in tokenizer.decode(sample.input_ids)


def test_all_that_does_not_fit_is_named_with_file_and_row(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    twice = [*question_answer(" ", "<think>"), *question_answer("q", "<｜User｜>")]
    path = write_jsonl(
        "a.jsonl", question_answer("q", "a"), twice, question_answer("q", "b", reasoning_content="SURROGATE")
    )
    Path(path).write_text(Path(path).read_text().replace("SURROGATE", "\\ud800"))
    with pytest.raises(RowError, match=r"a\.jsonl:2: messages\[0\]\.content: is ' '; a question needs text"):
        open_or_build([path], tokenizer, TokenizeOptions(64), tmp_path)
    with open_or_check([path], tokenizer, TokenizeOptions(64), tmp_path) as cache:
        found = [error for _, examples in cache.report.errors.by_kind() for error in examples]
        assert [(error.source.removeprefix(f"{path}:"), error.field) for error in found] == [
            ("2", "messages[0].content"),
            ("2", "messages[1].content"),
            ("2", "messages[3].content"),
            ("3", "messages[1].reasoning_content"),
        ]
        assert cache.statistics.samples == 1
