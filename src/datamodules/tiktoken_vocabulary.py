"""Moonlight's and Kimi's tokenizers, which their repositories hold as tiktoken.model and a Python file.

transformers' own converter makes a tokenizer.json of the vocabulary. The Python file is never run: what it adds is how
text is split before the merges, one constant, read as text, and how the ids behind the vocabulary are named.
"""

import ast
import base64
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from src.disk.json_file import read_object
from src.errors import UserError

VOCABULARY = "tiktoken.model"
SETTINGS = "tokenizer_config.json"
CLASS = "PreTrainedTokenizerFast"  # of transformers, for a tokenizer.json of any model

# `pat_str` of tokenization_moonshot.py and tokenization_kimi.py, in every release of Moonlight, Kimi-K2 and later.
PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


class _Converter(TikTokenConverter):
    def load_tiktoken_bpe(self, tiktoken_url: str) -> dict[bytes, int]:
        """Without the package tiktoken, whose own reader gives a file that was read once before, by its path."""
        return read_ranks(Path(tiktoken_url))


def convert(directory: Path) -> Tokenizer:
    """The tokenizer of a published directory, with tiktoken's ids (`benchmarks/compare_tiktoken.py` compares them).

    Raises:
        ValueError: a file is missing or not as it is published, or the Python file splits text in another way.
    """
    check_pattern(directory)
    tokenizer: Tokenizer = _Converter(str(directory / VOCABULARY), pattern=PATTERN).converted()
    for index, token in special_tokens(directory, tokenizer.get_vocab_size()).items():
        tokenizer.add_tokens([token])
        if (existing := tokenizer.token_to_id(token.content)) != index:
            raise UserError(
                f"{directory / SETTINGS}: added_tokens_decoder gives {token.content!r} the id {index}, but it has "
                f"{existing} already; take the file that came with {VOCABULARY}"
            )
    return tokenizer


def settings(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json of the converted tokenizer: the published one without the Python class."""
    path = directory / SETTINGS
    if not path.is_file():
        raise UserError(f"{path} is missing; it names the special tokens of {VOCABULARY}")
    return {key: value for key, value in read_object(path).items() if key != "auto_map"} | {"tokenizer_class": CLASS}


def read_ranks(path: Path) -> dict[bytes, int]:
    """tiktoken's file: on each line a token's bytes in base64 and its id.

    Raises ValueError for a line that is none, and where the ids are not 0, 1, 2 and so on or a byte has none.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise UserError(f"{path}:{number}: not a token in base64 and its id: copy the file again") from None
    if not ranks or sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(f"{path}: the ids of its {len(ranks)} tokens are not 0 to {len(ranks) - 1}; copy it again")
    if absent := sum(bytes([byte]) not in ranks for byte in range(256)):
        raise UserError(f"{path} lacks {absent} of the 256 bytes, so that it cannot encode every text; copy it again")
    return ranks


def special_tokens(directory: Path, first: int) -> dict[int, AddedToken]:
    """By id, from `first`, the vocabulary's size, to the last id that tokenizer_config.json names.

    An id between them without a name is `<|reserved_token_{id}|>`, as in the published class.
    """
    decoder = settings(directory).get("added_tokens_decoder")
    entries = decoder if isinstance(decoder, dict) else {}
    named = {int(index): token for index, token in entries.items() if index.isdecimal() and _is_token(token)}
    if not named or len(named) < len(entries) or min(named) < first:
        raise UserError(
            f"{directory / SETTINGS}: added_tokens_decoder must name special tokens with ids from {first}, the size of "
            f"{VOCABULARY}, and names {min(named, default='none')}; take the file that came with it"
        )
    reserved = {index: {"content": f"<|reserved_token_{index}|>"} for index in range(first, max(named))}
    return {
        index: AddedToken(token["content"], special=token.get("special", True), normalized=False)
        for index, token in sorted((reserved | named).items())
    }


def _is_token(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("content"), str)


def check_pattern(directory: Path) -> None:
    """Raises ValueError where a Python file of the directory declares another `pat_str` than PATTERN.

    Others are not taken, since the engine of `tokenizers` reads some constructs otherwise than tiktoken's.
    """
    declared = {
        file: pattern
        for file in sorted(directory.glob("*.py"))
        if file.is_file() and (pattern := _declared(file)) is not None
    }
    for file, pattern in declared.items():
        if pattern != PATTERN:
            raise UserError(
                f"{file} splits text by another pat_str than Moonlight's and Kimi's, which alone is known to give the "
                "same tokens without running it: give a --data.tokenizer directory with a tokenizer.json"
            )
    if not declared:
        from lightning.pytorch.utilities import rank_zero_warn  # which takes a second

        rank_zero_warn(f"{directory}: no Python file declares pat_str; text is split as by Moonlight's and Kimi's")


def _declared(file: Path) -> str | None:
    """The constant `pat_str` of a module, read and not run; None where it has none, empty where it is no constant."""
    try:
        module = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # not what declares it
        return None
    for node in ast.walk(module):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == "pat_str" for target in targets):
                return _text(node.value)
    return None


def _text(value: ast.expr) -> str:
    """A text, or texts joined by one: `"|".join([...])`."""
    match value:
        case ast.Call(func=ast.Attribute(value=ast.Constant(value=str(glue)), attr="join"), args=[parts], keywords=[]):
            pass
        case _:
            glue, parts = "", value
    try:
        return glue.join(ast.literal_eval(parts))
    except (ValueError, TypeError):
        return ""
