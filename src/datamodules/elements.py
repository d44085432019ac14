"""Splits JSON text other than JSON Lines (arrays and values in sequence) into values, in constant memory.

It finds where a value begins and ends, not whether it is valid."""

import re
from collections.abc import Iterator
from typing import BinaryIO, Literal

State = Literal["array", "values"]

_BLOCK = 1 << 20
_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(rb"[ \t\r\n]*+")
_TO_BRACKET = re.compile(rb'(?:[^"\[\]{}]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+', re.DOTALL)
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_SCALAR = re.compile(rb"[^,\[\]{}\" \t\r\n]++")


def elements(file: BinaryIO, state: State, offset: int) -> Iterator[tuple[State, int, bytes]]:
    """Yields (state, first byte, text) of each value: an array's elements, and values outside arrays.

    Args:
        file: reads on from byte `offset`.
        state: what comes at `offset`. "array": a value of an array; "values": whatever may be outside arrays.

    Raises:
        ValueError: a comma is missing or too many, an array or a value has no end.
    """
    return _Text(file, offset).elements(state)


class _Text:
    """Text read on demand: `data` begins at byte `offset` of the file and is consumed up to `position`."""

    def __init__(self, file: BinaryIO, offset: int) -> None:
        self.file, self.offset = file, offset
        self.data, self.position = b"", 0

    def elements(self, state: State) -> Iterator[tuple[State, int, bytes]]:
        after = (
            "," if state == "array" else ""
        )  # what we have just passed in the array: "[", "," or "a value"; "": nothing
        while (char := self._next(outside=not after)) is not None:
            if not after and char == b"[":
                after = "["
                self.position += 1
            elif char == b"]" and after in ("[", "a value"):
                after = ""
                self.position += 1
            elif char == b"," and after == "a value":
                after = ","
                self.position += 1
            elif after == "a value":
                raise ValueError("a comma or ']' is missing")
            elif char in (b",", b"]", b"}"):
                raise ValueError(f"{char.decode()!r} found where a value is expected")
            else:
                start = self.offset + self.position
                yield "array" if after else "values", start, self._value()
                after = "a value" if after else ""
        if after:
            raise ValueError("the file ends inside an array")

    def _next(self, outside: bool) -> bytes | None:
        """The next character other than white space; None at the end. Outside arrays a BOM is white space."""
        while True:
            match = _SPACE.match(self.data, self.position)
            assert match is not None
            self.position = match.end()
            if outside and self.data.startswith(_BOM, self.position):
                self.position += len(_BOM)
            elif self.position + len(_BOM) <= len(self.data) or not self._more(_BLOCK):
                return self.data[self.position : self.position + 1] or None

    def _value(self) -> bytes:
        """Reads the value at the position and moves past it."""
        block = _BLOCK
        while (end := self._value_end()) is None:
            if not self._more(block):
                end = len(self.data)
                if self.data[self.position] in b'"[{':
                    raise ValueError("the file ends inside a value")
                break
            block *= 2  # so that a long value is scanned a few times at most
        text = self.data[self.position : end]
        self.position = end
        return text

    def _value_end(self) -> int | None:
        """None if the value may continue beyond `data`."""
        data, position, depth = self.data, self.position, 0
        if data[position] not in b"[{":
            match = (_STRING if data[position] == ord('"') else _SCALAR).match(data, position)
            return None if match is None or match.end() == len(data) else match.end()
        while True:
            match = _TO_BRACKET.match(data, position)
            assert match is not None
            position = match.end()
            if position == len(data) or data[position] == ord('"'):  # a string without an end
                return None
            depth += 1 if data[position] in b"[{" else -1
            position += 1
            if not depth:
                return position

    def _more(self, size: int) -> bool:
        block = self.file.read(size)
        self.offset += self.position
        self.data, self.position = self.data[self.position :] + block, 0
        return bool(block)
