"""Turns batches of documents into token ids. Knows no files and no splits.

Importing it must stay cheap (no torch): every tokenizing process does.
"""

import itertools
from array import array
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

PIECE_CHARACTERS = 1 << 17
"""Longer documents are tokenized in pieces, cut at line ends: the library needs over 100 bytes per token."""


class Encoded(NamedTuple):
    """The ids of a batch of documents, each followed by the separator."""

    lengths: NDArray[np.int64]
    """(documents,): ids of each, with its separator."""
    token_ids: NDArray[np.integer]
    """(tokens,) uint16 or uint32, all documents in order."""


class Encoder:
    """Tokenizes batches of documents and puts `separator_id` after each."""

    def __init__(self, tokenizer: Tokenizer, separator_id: int) -> None:
        self._tokenizer, self._separator_id = tokenizer, separator_id
        tokenizer.encode_special_tokens = True  # not part of its JSON
        self.dtype = token_dtype(tokenizer)
        self._code = "H" if self.dtype == "<u2" else "I"

    def __call__(self, texts: list[str]) -> Encoded:
        pieces = [cut_at_line_ends(text, PIECE_CHARACTERS) for text in texts]
        ids, lengths = array(self._code), np.empty(len(texts), dtype=np.int64)
        encodings = iter(self._encode(list(itertools.chain.from_iterable(pieces))))
        for index, parts in enumerate(pieces):
            before = len(ids)
            for _ in parts:
                ids.extend(array(self._code, next(encodings)))
            ids.append(self._separator_id)
            lengths[index] = len(ids) - before
        return Encoded(lengths, np.frombuffer(ids, dtype=self.dtype))

    def _encode(self, pieces: list[str]) -> Iterator[list[int]]:
        start = 0
        while start < len(pieces):
            end, size = start, 0
            while end < len(pieces) and size < 2 * PIECE_CHARACTERS:
                size, end = size + len(pieces[end]), end + 1
            for encoding in self._tokenizer.encode_batch_fast(pieces[start:end], add_special_tokens=False):
                yield encoding.ids
            start = end


def token_dtype(tokenizer: Tokenizer) -> str:
    """Return the dtype in which ids are stored: little-endian, 2 bytes if every id fits, else 4."""
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    return "<u2" if largest < 2**16 else "<u4"


def cut_at_line_ends(text: str, limit: int) -> list[str]:
    """Cut a text into pieces of at most `limit` characters, after a line end where there is one."""
    pieces: list[str] = []
    start = 0
    while len(text) - start > limit:
        end = text.rfind("\n", start, start + limit) + 1 or start + limit
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def serve(descriptor: int) -> None:
    """Encode batches that arrive over a socket until it closes."""
    with Connection(descriptor) as connection:
        tokenizer, separator_id = connection.recv()
        encoder = Encoder(Tokenizer.from_str(tokenizer), separator_id)
        with suppress(EOFError, OSError):  # the process that sends batches is done, or was killed
            while True:
                connection.send(encoder(connection.recv()))
