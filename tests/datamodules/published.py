"""Directories as Moonlight and Kimi publish their tokenizers: a small vocabulary of our own, and Python that must not
run."""

import base64
import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from src.datamodules.tiktoken_vocabulary import PATTERN

ROOT = Path(__file__).parents[2]
SIZE = 1200
# By place behind the vocabulary; the others up to the last are reserved.
SPECIAL = {
    0: "[BOS]",
    1: "[EOS]",
    2: "<|im_end|>",
    3: "<|im_user|>",
    4: "<|im_assistant|>",
    10: "<|im_system|>",
    11: "<|tool_call_begin|>",
    17: "<|im_middle|>",
    39: "[PAD]",
}
TEMPLATE = (
    "{% for m in messages %}<|im_{{ m.role }}|>{{ m.role }}<|im_middle|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"
)
# Declares the pattern as theirs does, in a class, of raw strings in triple quotes.
PYTHON = r'''
class TikTokenTokenizer(PreTrainedTokenizer):
    num_reserved_special_tokens = 256
    pat_str = "|".join(
        [
            r"""[\p{Han}]+""",
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""\p{N}{1,3}""",
            r""" ?[^\s\p{L}\p{N}]+[\r\n]*""",
            r"""\s*[\r\n]+""",
            r"""\s+(?!\S)""",
            r"""\s+""",
        ]
    )


raise RuntimeError("the tokenizer's code was run")
'''
NAMES = {"kimi": "tokenization_kimi", "moonlight": "tokenization_moonshot"}


@cache
def vocabulary() -> list[bytes]:
    """Tokens by id, trained on the demo's conversations."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PATTERN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=SIZE, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train([str(ROOT / "data/demo/train.jsonl")], trainer)
    single = {character: byte for byte, character in bytes_to_unicode().items()}
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return [bytes(single[character] for character in token) for token, _ in tokens]


def write_tokenizer(directory: Path, model: str) -> Path:
    """`model` is kimi, whose chat template is a file, or moonlight, which has it among the tokenizer's settings."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = [f"{base64.b64encode(token).decode()} {index}\n" for index, token in enumerate(vocabulary())]
    (directory / "tiktoken.model").write_text("".join(lines))
    (directory / f"{NAMES[model]}.py").write_text(PYTHON)
    settings: dict[str, Any] = {
        "added_tokens_decoder": {
            str(SIZE + place): {
                "content": name,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": "tool" not in name,
            }
            for place, name in SPECIAL.items()
        },
        "additional_special_tokens": ["<|im_end|>", "<|im_user|>", "<|im_assistant|>"],
        "bos_token": "[BOS]",
        "clean_up_tokenization_spaces": False,
        "eos_token": "[EOS]",
        "extra_special_tokens": {},
        "model_max_length": 1_000_000,
        "pad_token": "[PAD]",
        "tokenizer_class": "TikTokenTokenizer",
        "auto_map": {"AutoTokenizer": [f"{NAMES[model]}.TikTokenTokenizer", None]},
    }
    if model == "kimi":
        (directory / "chat_template.jinja").write_text(TEMPLATE)
    else:
        settings["chat_template"] = TEMPLATE
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory
