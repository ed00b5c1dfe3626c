"""Items of a JSON array, one at a time, whatever its length. Knows nothing of what the items mean."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from src.errors import DataError

_READ_BYTES = 1 << 20
_ITEM_CHARACTERS = 64 << 20
_SPACE = " \t\r\n"


def array_items(data: BinaryIO, path: Path) -> Iterator[tuple[int, object]]:
    """Yield the line on which each item of the array ends, from 1, and the item.

    Raises:
        DataError: the text is not a JSON array; after a syntax error nothing tells where the next item starts.
    """
    decoder, scanner = json.JSONDecoder(), _Scanner(data, path)
    scanner.expect("[")
    if scanner.next_is("]"):
        return
    while True:
        item = scanner.item(decoder)
        yield scanner.line, item
        if scanner.next_is("]"):
            return
        scanner.expect(",")


class _Scanner:
    def __init__(self, data: BinaryIO, path: Path) -> None:
        self._data, self._path = data, path
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._text, self._at, self.line, self._ended = "", 0, 1, False

    def expect(self, mark: str) -> None:
        if not self.next_is(mark):
            self._fail(f"expected {mark!r}")

    def next_is(self, mark: str) -> bool:
        """Step over white space and, if it follows, over `mark`."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._advance(self._at + 1)
            if self._at < len(self._text):
                break
            if not self._read():
                self._fail("the array is cut off")
        if self._text[self._at] != mark:
            return False
        self._advance(self._at + 1)
        return True

    def item(self, decoder: json.JSONDecoder) -> object:
        self.next_is("")
        wanted = _READ_BYTES
        while True:
            try:
                item, end = decoder.raw_decode(self._text, self._at)
            except (json.JSONDecodeError, RecursionError) as error:
                if len(self._text) - self._at > _ITEM_CHARACTERS or not self._read(wanted):
                    self._fail(str(error))
                wanted *= 2  # so that a long item is not parsed from its start too often
                continue
            if end < len(self._text) or not self._read():  # a number may go on in the next piece
                self._advance(end)
                return item

    def _advance(self, end: int) -> None:
        self.line += self._text.count("\n", self._at, end)
        self._at = end

    def _read(self, num_bytes: int = _READ_BYTES) -> bool:
        if self._ended:
            return False
        piece = self._data.read(num_bytes)
        self._ended = not piece
        try:
            self._text = self._text[self._at :] + self._decode(piece, final=self._ended)
        except UnicodeDecodeError as error:
            self._fail(f"not UTF-8 ({error.reason})")
        self._at = 0
        return not self._ended

    def _fail(self, reason: str) -> None:
        raise DataError(
            f"{self._path}:{self.line}: not a JSON array ({reason}); correct the file, or write one object a line, "
            "where broken ones can be skipped"
        )
