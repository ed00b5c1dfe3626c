"""Readers: bytes of rows by token id, in any order. They know files and offsets, not what the bytes mean."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from src.errors import LutFormatError
from src.lut.layout import Shard, TableLayout, tokens_per_shard

Ids = NDArray[np.int64]
Bytes = NDArray[np.uint8]


class Reader(Protocol):
    """Fetches rows; safe to call from several threads."""

    def read(self, token_ids: Ids, rows: Bytes) -> None:
        """Fill `rows` (U, row_bytes) with the rows of `token_ids` (U,), each in [0, V)."""
        ...

    def close(self) -> None:
        """Let go of files and threads; reading afterwards is an error."""
        ...


class MemmapReader:
    """Copies out of a memory map. The oracle: simple, but every cold page costs a fault."""

    def __init__(self, lut_dir: Path, layout: TableLayout, shards: list[Shard]) -> None:
        """Map every shard."""
        self._step = tokens_per_shard(layout)
        self._maps = [
            np.memmap(
                lut_dir / shard.file_name,
                dtype=np.uint8,
                mode="r",
                offset=shard.rows_offset(layout),
                shape=(shard.num_tokens, layout.row_bytes),
            )
            for shard in shards
        ]

    def read(self, token_ids: Ids, rows: Bytes) -> None:
        """Copy row by row."""
        for position, token_id in enumerate(token_ids.tolist()):
            rows[position] = self._maps[token_id // self._step][token_id % self._step]

    def close(self) -> None:
        """Drop the maps."""
        self._maps.clear()


class PreadReader:
    """Positioned reads through the page cache: one system call per row, no page faults."""

    def __init__(self, lut_dir: Path, layout: TableLayout, shards: list[Shard]) -> None:
        """Open every shard."""
        self._step, self._row_bytes = tokens_per_shard(layout), layout.row_bytes
        self._paths = [lut_dir / shard.file_name for shard in shards]
        self._offsets = [shard.rows_offset(layout) for shard in shards]
        self._descriptors = [os.open(path, os.O_RDONLY) for path in self._paths]

    def read(self, token_ids: Ids, rows: Bytes) -> None:
        """Read row by row, straight into `rows`."""
        for position, token_id in enumerate(token_ids.tolist()):
            shard, row = divmod(token_id, self._step)
            self._read_row(shard, self._offsets[shard] + row * self._row_bytes, memoryview(rows[position]))

    def _read_row(self, shard: int, offset: int, target: memoryview) -> None:
        while target:
            count = os.preadv(self._descriptors[shard], [target], offset)
            if count == 0:
                raise LutFormatError(
                    f"{self._paths[shard]}: ends at byte {offset} while a row was read, so it was truncated; "
                    "copy the table again or rebuild it"
                )
            target, offset = target[count:], offset + count

    def close(self) -> None:
        """Close the files."""
        while self._descriptors:
            os.close(self._descriptors.pop())


READERS: dict[str, Callable[[Path, TableLayout, list[Shard]], Reader]] = {
    "memmap": MemmapReader,
    "pread": PreadReader,
}
