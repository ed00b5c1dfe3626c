"""Reads a table from its first row to its last, in runs of rows that are checked: for whoever needs all of it.

Knows nothing of random access, caches or threads; `LutStore` does.

U token ids in a run.
"""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from src.errors import LutFormatError
from src.lut.integrity import check_rows, damaged_rows
from src.lut.layout import CHECKSUM_BYTES, Shard, TableLayout, plan_shards, tokens_per_shard


class TableScan:
    """Rows of consecutive ids, straight from the shards; the caller has read the manifest."""

    def __init__(self, lut_dir: Path, layout: TableLayout) -> None:
        """Remember where rows lie; files are opened when they are read."""
        self._lut_dir, self.layout = lut_dir, layout
        self._shards = plan_shards(layout)

    def read(self, first_token: int, num_tokens: int) -> NDArray[np.uint8]:
        """Return rows (num_tokens, row_bytes) of consecutive ids; LutFormatError names the first damaged one."""
        rows, checksums = self._read(first_token, num_tokens)
        check_rows(np.arange(first_token, first_token + num_tokens), rows, checksums, str(self._lut_dir))
        return rows

    def damaged(self, first_token: int, num_tokens: int) -> list[str]:
        """Return a sentence for each of some consecutive ids whose row does not match its checksum."""
        rows, checksums = self._read(first_token, num_tokens)
        return list(damaged_rows(np.arange(first_token, first_token + num_tokens), rows, checksums))

    def _read(self, first_token: int, num_tokens: int) -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
        rows = np.empty((num_tokens, self.layout.row_bytes), dtype=np.uint8)
        checksums = np.empty(num_tokens, dtype="<u4")
        done = 0
        while done < num_tokens:
            shard = self._shards[(first_token + done) // tokens_per_shard(self.layout)]
            row = first_token + done - shard.first_token
            count = min(num_tokens - done, shard.num_tokens - row)
            self._read_shard(shard, row, rows[done : done + count], checksums[done : done + count])
            done += count
        return rows, checksums

    def _read_shard(self, shard: Shard, row: int, rows: NDArray[np.uint8], checksums: NDArray[np.uint32]) -> None:
        layout, path = self.layout, self._lut_dir / shard.file_name
        descriptor = os.open(path, os.O_RDONLY)
        try:
            _read_all(descriptor, rows.data, shard.rows_offset(layout) + row * layout.row_bytes, path)
            _read_all(descriptor, checksums.data, shard.checksums_offset(layout) + row * CHECKSUM_BYTES, path)
        finally:
            os.close(descriptor)


def _read_all(descriptor: int, target: memoryview, offset: int, path: Path) -> None:
    rest = target.cast("B")
    while rest:
        count = os.preadv(descriptor, [rest], offset)
        if count == 0:
            raise LutFormatError(
                f"{path}: ends at byte {offset:,}, inside its rows; copy the table again or rebuild it"
            )
        rest, offset = rest[count:], offset + count
