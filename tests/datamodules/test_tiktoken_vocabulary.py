"""Moonlight's and Kimi's published tokenizers: tiktoken's ids, without running their code."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from benchmarks.compare_tiktoken import first_difference
from src.datamodules.chat_template import ChatTemplate
from src.datamodules.tokenizer import load_tokenizer, opening_files

from .conftest import question_answer
from .published import SIZE, SPECIAL, TEMPLATE, vocabulary, write_tokenizer

MODELS = ["kimi", "moonlight"]


@pytest.mark.parametrize(("model", "texts"), [("kimi", 10_000), ("moonlight", 500)])
def test_ids_are_those_of_tiktoken(model: str, texts: int, tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    directory = write_tokenizer(tmp_path, model)
    assert first_difference(directory, load_tokenizer(str(directory)), texts) is None


def test_the_comparison_sees_a_difference(tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    directory = write_tokenizer(tmp_path, "kimi")
    tokenizer = load_tokenizer(str(directory))
    lines = (directory / "tiktoken.model").read_text().splitlines()
    swapped = [f"{line.split()[0]} {SIZE - 1 - place}" for place, line in enumerate(lines)]
    (directory / "tiktoken.model").write_text("\n".join(swapped))
    assert first_difference(directory, tokenizer, 10) is not None


@pytest.mark.parametrize("model", MODELS)
def test_what_is_behind_the_vocabulary(model: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_tokenizer(tmp_path, model)))
    assert len(tokenizer) == SIZE + 40
    names = {place: SPECIAL.get(place, f"<|reserved_token_{SIZE + place}|>") for place in range(40)}
    assert {index - SIZE: token.content for index, token in tokenizer.added_tokens_decoder.items()} == names
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("[BOS]", "[EOS]", "[PAD]")
    call = tokenizer.convert_tokens_to_ids("<|tool_call_begin|>")
    assert tokenizer.decode([call, SIZE + 1], skip_special_tokens=True) == "<|tool_call_begin|>"
    assert tokenizer.chat_template == TEMPLATE and tokenizer.name_or_path == str(tmp_path)
    (sample,) = ChatTemplate(tokenizer).render(question_answer("二加二?", "四"))
    text = "<|im_user|>user<|im_middle|>二加二?<|im_end|><|im_assistant|>assistant<|im_middle|>四<|im_end|>"
    assert tokenizer.decode(sample.input_ids) == text


@pytest.mark.parametrize("model", MODELS)
def test_a_copy_opens_without_their_code(model: str, tmp_path: Path) -> None:
    published = write_tokenizer(tmp_path / "published", model)
    ours, copy = load_tokenizer(str(published)), tmp_path / "copy"
    copy.mkdir()
    if model == "kimi":
        (copy / "chat_template.jinja").write_text(TEMPLATE)
    for name, text in opening_files(ours).items():
        (copy / name).write_text(text, encoding="utf-8")
    assert sorted(opening_files(ours)) == ["tokenizer.json", "tokenizer_config.json"]
    before, after = (json.loads((folder / "tokenizer_config.json").read_text()) for folder in (published, copy))
    assert after == {k: v for k, v in before.items() if k != "auto_map"} | {
        "tokenizer_class": "PreTrainedTokenizerFast"
    }
    theirs = AutoTokenizer.from_pretrained(copy, trust_remote_code=False)
    text = "Ok, 你好's\n12345 <|im_user|>" + "".join(token.decode("utf-8", "ignore") for token in vocabulary())
    assert theirs.encode(text) == ours.encode(text)
    assert theirs.chat_template == TEMPLATE and theirs.decode(theirs.encode(text)) == text
    assert not opening_files(load_tokenizer(str(copy)))


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def breaks(directory: Path) -> None:
        path = directory / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        change(settings)
        path.write_text(json.dumps(settings))

    return breaks


def replace(old: str, new: str, name: str = "tokenization_kimi.py") -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text((directory / name).read_text().replace(old, new))


def cut(directory: Path) -> None:
    path = directory / "tiktoken.model"
    path.write_text("\n".join(path.read_text().splitlines()[:-3] + ["AQ"]))


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (replace(r"\p{N}{1,3}", r"\p{N}"), r"tokenization_kimi\.py splits text by another pat_str"),
        (replace('"|".join(', "make("), r"tokenization_kimi\.py splits text by another pat_str"),
        (cut, r"tiktoken\.model:1198: not a token in base64"),
        (replace(" 700\n", " 7\n", "tiktoken.model"), r"tiktoken\.model: the ids of its 1200 tokens are not 0 to 1199"),
        (replace("AA== ", "AAAAAAAA ", "tiktoken.model"), r"tiktoken\.model lacks 1 of the 256 bytes"),
        (edit(lambda s: s.pop("added_tokens_decoder")), r"must name special tokens with ids from 1200.* names none"),
        (edit(lambda s: s["added_tokens_decoder"].update({"7": {"content": "x"}})), r"from 1200.* and names 7"),
        (
            edit(lambda s: s["added_tokens_decoder"].update({"1205": {"content": "[EOS]"}})),
            r"gives '\[EOS\]' the id 1205, but it has 1201 already",
        ),
        (replace("{", "", "tokenizer_config.json"), r"tokenizer_config\.json is not valid JSON"),
        (lambda directory: (directory / "tokenizer_config.json").unlink(), r"tokenizer_config\.json is missing"),
        (lambda directory: (directory / "chat_template.jinja").unlink(), "has no chat template"),
    ],
)
def test_what_is_not_as_published_is_named(breaks: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    breaks(write_tokenizer(tmp_path, "kimi"))
    with pytest.raises(ValueError, match=message):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("python", [None, "raise SystemExit('run')\n", "not Python"])
def test_without_a_pattern_theirs_is_taken_and_said(python: str | None, tmp_path: Path) -> None:
    expected = load_tokenizer(str(write_tokenizer(tmp_path, "kimi"))).encode("12345 Ok's 你好")
    (tmp_path / "tokenization_kimi.py").unlink()
    if python is not None:
        (tmp_path / "tokenization_kimi.py").write_text(python)
    with pytest.warns(UserWarning, match="no Python file declares pat_str"):
        assert load_tokenizer(str(tmp_path)).encode("12345 Ok's 你好") == expected
