"""Reads Zstandard streams and notices where one was cut off, which the library's own reader does not."""

import io
from typing import TYPE_CHECKING, BinaryIO

import zstandard

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_READ_BYTES = 1 << 18


class ZstdReader(io.RawIOBase):
    """The decompressed bytes of a file of one or more Zstandard frames; EOFError when the last one is incomplete."""

    def __init__(self, raw: BinaryIO) -> None:
        """Read frames from `raw`."""
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._pending = memoryview(b"")
        self._in_frame = False

    def readable(self) -> bool:
        """Say yes to `io.BufferedReader`."""
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        """Fill as much of `buffer` as one piece of decompressed bytes does; 0 at the end."""
        target = memoryview(buffer).cast("B")
        while not self._pending:
            if not (piece := self._next_piece()):
                return 0
            self._pending = memoryview(piece)
        count = min(len(target), len(self._pending))
        target[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count

    def _next_piece(self) -> bytes:
        """Return the next decompressed bytes, empty only at the end."""
        while True:
            compressed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._in_frame = zstandard.ZstdDecompressor().decompressobj(), False
            compressed = compressed or self._raw.read(_READ_BYTES)
            if not compressed:
                if self._in_frame:
                    raise EOFError("the last frame is incomplete")
                return b""
            self._in_frame = True
            if piece := self._frame.decompress(compressed):
                return piece
