"""Rows that need no file access per request: a copy of the table, and the memory map that is the oracle."""

import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src.errors import LutError
from src.lut.layout import Shard, TableLayout, tokens_per_shard
from src.lut.readers.reader import Arrived, Bytes, Done, Fetch, Reader, ShardFiles, Wanted


class MemoryReader(Reader):
    """The whole table in memory, on a device of choice; requests never touch the disk."""

    def __init__(self, lut_dir: Path, layout: TableLayout, shards: Sequence[Shard], device: torch.device) -> None:
        """Read every shard; costs `layout.table_bytes` of memory."""
        table = torch.empty(layout.vocab_size, layout.row_bytes, dtype=torch.uint8, device=device)
        files = ShardFiles(lut_dir, layout, shards)
        try:
            for index, shard in enumerate(shards):
                part = table[shard.first_token : shard.first_token + shard.num_tokens]
                staging = part if device.type == "cpu" else torch.empty(part.shape, dtype=torch.uint8)
                files.read_row(index, files.locate(shard.first_token)[1], staging.numpy().data.cast("B"))
                if staging is not part:
                    part.copy_(staging)
        finally:
            files.close()
        self._table: Tensor | None = table

    @property
    def table(self) -> Tensor:
        """All rows (V, row_bytes) uint8; LutError after `close`."""
        if self._table is None:
            raise LutError("the table is closed; open it again to read")
        return self._table

    def start(self, wanted: Wanted, rows: Bytes, arrived: Arrived, *, background: bool) -> Fetch:
        """Copy row by row; they were checked, if at all, when the table was read."""
        table = self.table.numpy()
        for token_id, position in wanted:
            rows[position] = table[token_id]
        return Done()

    def close(self) -> None:
        """Free the table."""
        self._table = None


class MemmapReader(Reader):
    """Copies out of a memory map. The oracle: simple, but every cold page costs a fault."""

    def __init__(self, lut_dir: Path, layout: TableLayout, shards: Sequence[Shard]) -> None:
        """Map every shard."""
        self._files = ShardFiles(lut_dir, layout, shards)
        self._step = tokens_per_shard(layout)
        self._maps = [
            np.memmap(
                path,
                dtype=np.uint8,
                mode="r",
                offset=shard.rows_offset(layout),
                shape=(shard.num_tokens, layout.row_bytes),
            )
            for path, shard in zip(self._files.paths, shards, strict=True)
        ]

    def start(self, wanted: Wanted, rows: Bytes, arrived: Arrived, *, background: bool) -> Fetch:
        """Copy row by row. The size is asked for each time: beyond a file's end a map kills the process."""
        for token_id, position in wanted:
            shard, offset = self._files.locate(token_id)
            if os.fstat(self._files.descriptor(shard)).st_size < offset + self._files.row_bytes:
                raise self._files.truncated(shard, offset)
            rows[position] = self._maps[shard][token_id % self._step]
            arrived(token_id, position)
        return Done()

    def release_pages(self) -> None:
        """Unmap what was touched; a mapped page stays in the page cache whatever is advised."""
        for pages in self._maps:
            release_pages(pages)

    def close(self) -> None:
        """Drop the maps."""
        self._maps.clear()
        self._files.close()


def release_pages(pages: "np.memmap[Any, np.dtype[np.uint8]]") -> None:
    """Take the pages of a map out of this process; they are read or found again at the next touch."""
    if isinstance(pages.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        pages.base.madvise(mmap.MADV_DONTNEED)
