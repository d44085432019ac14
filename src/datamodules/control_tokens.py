"""Control tokens inside what people and models said: where they stand, and how they are encoded as ordinary text.

A control token is one of the tokenizer's special tokens or a marker of turns, tools and the like that the chat template
writes. Spelled in a message, it would end a turn, open another or call a tool that nobody called.
"""

import re
from collections.abc import Collection, Iterator
from typing import Any, Literal

from transformers import PreTrainedTokenizerFast

from src.errors import UserError

ControlTokens = Literal["error", "text", "keep"]

# Around a control token that is text, while the template has it: two code points that are no characters.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_MARKER = re.compile(r"<[^<>\s'\"{}]+>|\[/?[A-Z_]{2,}\]")  # what a template's own markers look like


class ControlTokenText:
    """Finds control tokens in text and encodes text that has some.

    Args:
        seen: what the template writes: its source and conversations rendered by it.
        but: strings that are no control tokens though they look so: the tags of thinking.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seen: str, but: Collection[str]) -> None:
        self._backend = tokenizer.backend_tokenizer
        added = tokenizer.added_tokens_decoder
        self._ids = {token.content: index for index, token in added.items()}
        tokens = {
            token.content
            for token in added.values()
            if token.special or token.content in seen or _MARKER.fullmatch(token.content)
        }
        spelled = sorted(
            {*tokens, *_MARKER.findall(seen), *tokenizer.all_special_tokens} - set(but), key=len, reverse=True
        )
        # Hundreds of tokens with few beginnings: most text is passed over by the short pattern.
        self._beginnings = _any_of(sorted({text[:2] for text in spelled}))
        self._tokens = _any_of(spelled)
        self._marked = re.compile(f"{_OPEN}(.*?){_CLOSE}", re.DOTALL)

    def find(self, value: Any, path: str = "") -> Iterator[tuple[str, str]]:
        """Yields (path inside `value`, control token), the first of each string."""
        if isinstance(value, str):
            if self._beginnings.search(value) and (match := self._tokens.search(value)):
                yield path, match[0]
        elif isinstance(value, dict):
            for key, item in value.items():
                yield from self.find(item, f"{path}.{key}")
        elif isinstance(value, list):
            for index, item in enumerate(value):
                yield from self.find(item, f"{path}[{index}]")

    def mark(self, value: Any) -> Any:
        """A copy with every control token marked as text, for `encode`.

        Raises:
            ValueError: the text has a code point that marks.
        """
        if isinstance(value, str):
            if _OPEN in value or _CLOSE in value:
                raise UserError("holds U+FDD0 or U+FDD1, which are no characters; remove them")
            return self._tokens.sub(rf"{_OPEN}\g<0>{_CLOSE}", value) if self._beginnings.search(value) else value
        if isinstance(value, dict):
            return {key: self.mark(item) for key, item in value.items()}
        return [self.mark(item) for item in value] if isinstance(value, list) else value

    def encode(self, text: str) -> list[int]:
        """Token ids: of what is marked those of its characters, of all else those of the tokenizer.

        No special token is added, since a template writes BOS itself.

        Raises:
            ValueError: the template took a marked token apart, or the tokenizer makes one of its characters.
        """
        if _OPEN not in text:
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
            return ids
        pieces = self._marked.split(text)
        if any(_OPEN in piece or _CLOSE in piece for piece in pieces):
            raise UserError("the chat template takes a control token in a message apart; remove it from the message")
        return [
            index
            for place, piece in enumerate(pieces)
            for index in (self._spelled(piece) if place % 2 else self.encode(piece))
        ]

    def _spelled(self, token: str) -> list[int]:
        """Ids of a token's characters, by the parts of the tokenizer that know no added tokens."""
        text = self._backend.normalizer.normalize_str(token) if self._backend.normalizer else token
        pieces = self._backend.pre_tokenizer.pre_tokenize_str(text) if self._backend.pre_tokenizer else [(text, None)]
        ids = [item.id for piece, _ in pieces for item in self._backend.model.tokenize(piece)]
        if self._ids.get(token) in ids:
            raise UserError(f"{token!r} cannot be encoded as text: the tokenizer makes the token of its characters")
        return ids


def _any_of(strings: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, strings)) or "(?!)")
