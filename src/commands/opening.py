"""Opens a directory as its users do: by transformers' Auto classes, without running code from it."""

from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from src.datamodules.tokenizer import load_tokenizer
from src.weights.side_files import read_config, transformers_knows

TEXT = "It's 9.11, not 9.2!\n\n\tfor i in range(10):  # 你好，世界 2026年 é ſ —  \n<think>"


def opening(directory: str) -> tuple[list[str], list[str]]:
    """Why transformers cannot open a directory as `fit` reads it, and what its user should know.

    Models and tokenizers with their own class, such as Kimi-K2 and Moonlight as published, are not opened, since that
    would run their code. `fit` reads them, and an export of them opens.

    Args:
        directory: one whose config.json `load_config` has accepted.
    """
    path, fields = Path(directory), read_config(directory)
    problems, remarks = [], []
    named = [code if isinstance(code, list) else [code] for code in (fields.get("auto_map") or {}).values()]
    names = [name for codes in named for name in codes if isinstance(name, str)]  # a slow and a fast tokenizer, or null
    modules = {f"{name.rpartition('--')[2].split('.')[0]}.py" for name in names}
    absent = ", ".join(sorted(module for module in modules if not (path / module).is_file()))
    known = transformers_knows(fields["model_type"])
    unknown = f"transformers {transformers.__version__} does not open model_type {fields['model_type']!r}"
    if known:
        try:
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
            with torch.device("meta"):
                AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except Exception as error:
            problems.append(f"transformers does not open config.json: {_first_line(error)}")
        if absent:
            remarks.append(f"auto_map names {absent}, not here: trust_remote_code=True does not open it")
    elif not modules:
        problems.append(f"{unknown}: set it to 'deepseek_v3' in config.json")
    elif absent:
        remarks.append(f"{unknown}, and {absent} of its auto_map is not here; an export of it opens")
    else:
        remarks.append(f"{unknown} without the code that auto_map names; an export of it opens")
    if (path / "tokenizer.json").is_file():
        problems += _tokenizer_problems(directory, known)
    elif (path / "tiktoken.model").is_file():
        try:
            load_tokenizer(directory)
            remarks.append("tiktoken.model is opened by the code beside it alone; an export of it has tokenizer.json")
        except Exception as error:
            problems.append(f"tiktoken.model: {_first_line(error)}")
    if not (path / "generation_config.json").is_file():
        remarks.append("generation_config.json is not here: servers take the end of text from config.json")
    return problems, remarks


def _tokenizer_problems(directory: str, known: bool) -> list[str]:
    """Of a tokenizer.json: AutoTokenizer must read it as `fit` does, where it knows config.json's model_type."""
    try:
        ours = load_tokenizer(directory)
        theirs = AutoTokenizer.from_pretrained(directory, trust_remote_code=False) if known else ours
    except Exception as error:
        return [f"tokenizer: {_first_line(error)}"]
    text = TEXT + "".join(token.content for token in ours.added_tokens_decoder.values())
    expected = ours.backend_tokenizer.encode(text, add_special_tokens=False).ids
    if theirs.encode(text, add_special_tokens=False) != expected:
        return [
            f"AutoTokenizer opens a {type(theirs).__name__}, whose tokens are not those of tokenizer.json: set "
            "tokenizer_class to PreTrainedTokenizerFast in tokenizer_config.json"
        ]
    if theirs.chat_template != ours.chat_template:
        return ["AutoTokenizer opens another chat template than the one that training renders"]
    return []


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
