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

from src.data.text_rule import PIECE_CHARACTERS, TextRule, pieces


class Encoded(NamedTuple):
    """The ids of a batch of documents, with what stands before and after each."""

    lengths: NDArray[np.int64]
    """(documents,): ids of each."""
    token_ids: NDArray[np.integer]
    """(tokens,) uint16 or uint32, all documents in order."""


class Encoder:
    """Tokenizes batches of documents by the rule of a run."""

    def __init__(self, rule: TextRule) -> None:
        self._rule = rule
        rule.plain.encode_special_tokens = True  # not kept when it comes from another process
        self.dtype = token_dtype(rule.tokenizer)
        self._code = "H" if self.dtype == "<u2" else "I"

    def __call__(self, texts: list[str]) -> Encoded:
        documents = [pieces(text) for text in texts]
        ids, lengths = array(self._code), np.empty(len(texts), dtype=np.int64)
        encodings = iter(self._encode(list(itertools.chain.from_iterable(documents))))
        for index, parts in enumerate(documents):
            start = len(ids)
            ids.extend(self._rule.before)
            for _ in parts:
                ids.extend(array(self._code, next(encodings)))
            ids.extend(self._rule.after)
            lengths[index] = len(ids) - start
        return Encoded(lengths, np.frombuffer(ids, dtype=self.dtype))

    def _encode(self, parts: list[str]) -> Iterator[list[int]]:
        start = 0
        while start < len(parts):
            end, size = start, 0
            while end < len(parts) and size < 2 * PIECE_CHARACTERS:
                size, end = size + len(parts[end]), end + 1
            for encoding in self._rule.plain.encode_batch_fast(parts[start:end], add_special_tokens=False):
                yield encoding.ids
            start = end


def token_dtype(tokenizer: Tokenizer) -> str:
    """Return the dtype in which ids are stored: little-endian, 2 bytes if every id fits, else 4."""
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    return "<u2" if largest < 2**16 else "<u4"


def serve(descriptor: int) -> None:
    """Encode batches that arrive over a socket until it closes."""
    with Connection(descriptor) as connection:
        encoder = Encoder(connection.recv())
        with suppress(EOFError, OSError):  # the process that sends batches is done, or was killed
            while True:
                connection.send(encoder(connection.recv()))
