"""Readers that need no system call per row: the whole table in memory, and a memory map, the tests' oracle."""

import mmap
import os
from pathlib import Path

import numpy as np

from src.errors import LutError
from src.lut.layout import TableLayout
from src.lut.readers.reader import Arrived, Bytes, Reader, ResidentTable, ShardFiles, Wanted, register_reader


class MemmapReader(Reader):
    """Copies out of a memory map: simple, but every cold page costs a fault."""

    def __init__(self, lut_dir: Path, layout: TableLayout) -> None:
        self._files = ShardFiles(lut_dir, layout)
        self._maps = [
            np.memmap(path, np.uint8, "r", offset=shard.rows_offset(layout), shape=(shard.num_tokens, layout.row_bytes))
            for path, shard in zip(self._files.paths, self._files.shards, strict=True)
        ]

    def start(self, wanted: Wanted, rows: Bytes, arrived: Arrived) -> None:
        """Copy row by row, checking the file's size each time: beyond its end a map kills the process."""
        if not self._maps:
            raise LutError(f"{self._files.paths[0].parent}: the table is closed; open it again to read")
        for token_id, position in wanted:
            shard, offset = self._files.locate(token_id)
            if os.fstat(self._files.descriptors[shard]).st_size < offset + self._files.row_bytes:
                raise self._files.truncated(token_id)
            rows[position] = self._maps[shard][token_id - self._files.shards[shard].first_token]
            arrived(token_id, position)

    def release_pages(self) -> None:
        """Unmap touched pages; while they are mapped they cannot be dropped from the page cache."""
        for pages in self._maps:
            if isinstance(pages.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
                pages.base.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        self._maps.clear()
        self._files.close()


register_reader("memory", "all of it kept in memory, on the device", ResidentTable)
register_reader("memmap", "copied from a memory map", lambda lut_dir, layout, _: MemmapReader(lut_dir, layout))
