"""A document as text that a person can read: which parts are trained on, which tokens are special."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from transformers import PreTrainedTokenizerFast

from src.datamodules.collate import Document

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class Segment:
    """Neighbouring tokens of one kind. `text` has no control character but tab and line break."""

    text: str
    trained: bool
    special: bool


def segments(document: Document, tokenizer: PreTrainedTokenizerFast) -> Iterator[Segment]:
    """Yields a document in pieces. Tokens are decoded together, since a character may be spread over several; one that
    max_length cuts through is shown as an ellipsis."""
    trained = np.zeros(len(document.input_ids), dtype=bool)
    for start, stop in document.target_spans:
        trained[start:stop] = True
    special = np.isin(document.input_ids, list(tokenizer.added_tokens_decoder))
    kinds = list(zip(trained.tolist(), special.tolist(), strict=True))
    start = 0
    for (is_trained, is_special), group in groupby(kinds):
        stop = start + len(list(group))
        text = tokenizer.decode(document.input_ids[start:stop].tolist(), clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        if stop == len(kinds) and text.endswith("\ufffd"):
            text = text.rstrip("\ufffd") + "…"
        yield Segment(printable(text), is_trained, is_special)
        start = stop


def printable(text: str) -> str:
    """Without characters that would steer a terminal, and without halves of UTF-16 pairs, which no file can hold."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
