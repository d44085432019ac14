"""Compares a converted tokenizer with tiktoken: `python -m benchmarks.compare_tiktoken DIR [--texts 10000]`.

DIR is Moonlight's or Kimi's as it is published; of it tiktoken.model and tokenizer_config.json are read, its Python
file is not run. The texts are made of the vocabulary's own tokens, characters of many scripts, numbers, white space,
contractions and special tokens. Needs `pip install tiktoken`. Exits with 1 at the first text whose ids differ.
"""

import argparse
import os
import random
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from src.datamodules.tiktoken_vocabulary import PATTERN, VOCABULARY, read_ranks
from src.datamodules.tokenizer import load_tokenizer

PIECES = [
    "'s",
    "'T",
    "'ſ",
    "'re",
    "'LL",
    "n't",
    "你好",
    "的",
    "〇",
    "々",
    "한국",
    "カナ",
    "é",
    "e\u0301",
    "ß",
    "ﬁ",
    "🙂",
]
SPACES = [" ", "  ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", " \n ", ""]


def texts(ranks: dict[bytes, int], special: list[str], count: int, seed: int) -> Iterator[str]:
    """`count` texts of 0 to 60 pieces; every assigned character may come."""
    generator, tokens = random.Random(seed), list(ranks)
    assigned = [chr(c) for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c)) not in ("Cs", "Cn", "Co")]
    for _ in range(count):
        pieces = []
        for _ in range(generator.randrange(60)):
            kind = generator.random()
            if kind < 0.4:
                pieces.append(generator.choice(tokens).decode("utf-8", "ignore"))
            elif kind < 0.6:
                pieces.append(generator.choice(assigned) * generator.choice([1, 1, 1, 2, 7]))
            elif kind < 0.75:
                pieces.append(generator.choice(PIECES))
            elif kind < 0.85:
                pieces.append(str(generator.randrange(10 ** generator.randrange(1, 9))))
            elif kind < 0.98:
                pieces.append(generator.choice(SPACES))
            else:
                pieces.append(generator.choice(special))
        yield "".join(pieces)


def first_difference(
    directory: Path, tokenizer: PreTrainedTokenizerFast, count: int, seed: int = 0
) -> tuple[str, list[int], list[int]] | None:
    """The first text whose ids are not tiktoken's, tiktoken's and ours; None where all `count` are equal."""
    os.environ["TIKTOKEN_CACHE_DIR"] = ""  # else it reads what lay at this path before
    from tiktoken import Encoding
    from tiktoken.load import load_tiktoken_bpe

    ranks = load_tiktoken_bpe(str(directory / VOCABULARY))
    special = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    theirs = Encoding("published", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    for text in texts(read_ranks(directory / VOCABULARY), sorted(special), count, seed):
        expected = theirs.encode(text, allowed_special="all")
        found = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        if found != expected:
            return text, expected, found
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    difference = first_difference(args.directory, load_tokenizer(str(args.directory)), args.texts, args.seed)
    if difference is not None:
        text, expected, found = difference
        raise SystemExit(f"{text!r}\n  tiktoken:  {expected}\n  converted: {found}")
    print(f"{args.directory}: the ids of {args.texts:,} texts are tiktoken's")


if __name__ == "__main__":
    main()
