"""Where every byte of a table is. Pure arithmetic: no tensors, no files.

A table is a list of safetensors shards. Each holds `rows`, the token rows in order of id, and `checksums`, one
CRC-32 per row. The plan depends on the number of rows, the row size and the shard size alone, so any number of writers
and any interruption yields the same bytes. A checksum covers a row and its number, which is its token id.

A sparse table leaves ids out. Rows are then numbered in the order of the ids that have one, which are listed in a file
of their own; nothing here knows them, and what is called a token is the row of that number.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from zlib_ng.zlib_ng import crc32  # as zlib's, but 3 us for a row of 72 KiB instead of 17

from src.errors import LutFormatError
from src.lut.codecs import Codec, find_codec
from src.model.config import ModelConfig

SHARD_BYTES = 512 * 2**20
ALIGNMENT = 4096
"""Rows begin on a multiple of this in every shard, as unbuffered reads require."""
CHECKSUM_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class TableLayout:
    """The shape of a table: L layers that have experts, E experts, D hidden, V token ids, in one precision."""

    vocab_size: int
    num_layers: int
    num_experts: int
    hidden_size: int
    precision: str
    shard_bytes: int = SHARD_BYTES
    """Rows of a shard fit in this many bytes, unless a single row is larger."""
    sparse_rows: int | None = None
    """How many ids have a row in a sparse table; None: all of them."""

    @classmethod
    def of(cls, sizes: "ModelConfig | TableLayout", precision: str, shard_bytes: int = SHARD_BYTES) -> "TableLayout":
        """Return the layout of a model's table, or of a table in another precision, with a row for each id."""
        return cls(
            vocab_size=sizes.vocab_size,
            num_layers=len(sizes.mixture_layers) if isinstance(sizes, ModelConfig) else sizes.num_layers,
            num_experts=sizes.num_experts,
            hidden_size=sizes.hidden_size,
            precision=precision,
            shard_bytes=shard_bytes,
        )

    @cached_property
    def codec(self) -> Codec:
        """How vectors are stored; LutError when the precision is unknown."""
        return find_codec(self.precision)

    @cached_property
    def vector_bytes(self) -> int:
        return self.codec.vector_bytes(self.hidden_size)

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one token's row, layer after layer: what one lookup reads."""
        return self.num_layers * self.num_experts * self.vector_bytes

    @property
    def num_rows(self) -> int:
        return self.vocab_size if self.sparse_rows is None else self.sparse_rows

    def row_name(self, number: int) -> str:
        """Return what a row is called in messages."""
        return f"the row of token id {number}" if self.sparse_rows is None else f"row {number}"

    @cached_property
    def table_bytes(self) -> int:
        """Bytes of all rows, without headers and checksums."""
        return self.num_rows * self.row_bytes

    def to_dict(self) -> dict[str, int | str]:
        """Return the fields as they are written; `sparse_rows` only where there are such."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Shard:
    """A run of token ids in one file."""

    index: int
    first_token: int
    num_tokens: int

    @property
    def file_name(self) -> str:
        return f"rows-{self.index:05d}.safetensors"

    def header(self, layout: TableLayout) -> bytes:
        """The safetensors header, padded with spaces so that `rows` starts on an `ALIGNMENT` boundary."""
        rows_end = self.num_tokens * layout.row_bytes
        dtype, row_shape = layout.codec.stored_as(layout.num_layers, layout.num_experts, layout.hidden_size)
        checksums_end = rows_end + self.num_tokens * CHECKSUM_BYTES
        document = {
            "__metadata__": {"format": "mole-lut", "first_token": str(self.first_token)},
            "rows": {"dtype": dtype, "shape": [self.num_tokens, *row_shape], "data_offsets": [0, rows_end]},
            "checksums": {"dtype": "U32", "shape": [self.num_tokens], "data_offsets": [rows_end, checksums_end]},
        }
        text = json.dumps(document, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    def rows_offset(self, layout: TableLayout) -> int:
        """Byte of the file where the first row starts."""
        return len(self.header(layout))

    def checksums_offset(self, layout: TableLayout) -> int:
        return self.rows_offset(layout) + self.num_tokens * layout.row_bytes

    def file_bytes(self, layout: TableLayout) -> int:
        return self.checksums_offset(layout) + self.num_tokens * CHECKSUM_BYTES


def tokens_per_shard(layout: TableLayout) -> int:
    """Rows in every shard but the last: as many as fit `shard_bytes`, at least one."""
    return max(1, layout.shard_bytes // layout.row_bytes)


def plan_shards(layout: TableLayout) -> list[Shard]:
    """Cut all rows into shards."""
    step = tokens_per_shard(layout)
    starts = range(0, layout.num_rows, step)
    return [Shard(index, first, min(step, layout.num_rows - first)) for index, first in enumerate(starts)]


def row_checksums(first_token: int, rows: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """CRC-32 of (token id as 8 little-endian bytes, row) for consecutive ids; `rows` is (U, row_bytes)."""
    checksums = (row_checksum(first_token + offset, row) for offset, row in enumerate(rows))
    return np.fromiter(checksums, dtype=np.uint32, count=len(rows))


def row_checksum(token_id: int, row: NDArray[np.uint8]) -> int:
    """CRC-32 of one row and the id it belongs to, so that swapped rows are detected too."""
    return crc32(row.data, crc32(token_id.to_bytes(8, "little")))


def check_rows(
    token_ids: NDArray[np.int64], rows: NDArray[np.uint8], expected: NDArray[np.uint32], layout: TableLayout, where: str
) -> None:
    """Raise LutFormatError naming the first id whose row (U, row_bytes) does not match its checksum (U,)."""
    for problem in damaged_rows(token_ids, rows, expected, layout):
        raise LutFormatError(f"{where}: {problem}")


def damaged_rows(
    token_ids: NDArray[np.int64], rows: NDArray[np.uint8], expected: NDArray[np.uint32], layout: TableLayout
) -> Iterator[str]:
    """Yield a sentence for each id whose row (U, row_bytes) does not match its checksum (U,)."""
    for token_id, row, checksum in zip(token_ids.tolist(), rows, expected.tolist(), strict=True):
        if (found := row_checksum(token_id, row)) != checksum:
            yield (
                f"{layout.row_name(token_id)} is damaged: its CRC-32 is {found:08x}, expected {checksum:08x}; "
                "copy the table again or rebuild it with `python -m src.reparameterize`"
            )


def sha256(data: bytes) -> str:
    """SHA-256 as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()
