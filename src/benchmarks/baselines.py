"""What readers are compared with: bare unbuffered reads, which are the device's own limit, and a memory map."""

import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from torch import Tensor

from src.lut import LutStore
from src.lut.layout import ALIGNMENT, plan_shards
from src.lut.readers.memory import release_pages
from src.lut.readers.shard_files import ShardFiles

DEPTH = 16
"""Threads, as many as the direct reader has."""


class RawReads:
    """Bare O_DIRECT reads of the rows' blocks into aligned memory: the device's own limit, and the threads'."""

    def __init__(self, store: LutStore, capacity: int) -> None:
        """Open the shards past the page cache."""
        layout = store.layout
        self.files = ShardFiles(store.lut_dir, layout, plan_shards(layout), flags=os.O_DIRECT)
        self._block_bytes = (layout.row_bytes + 2 * (ALIGNMENT - 1)) // ALIGNMENT * ALIGNMENT
        memory = mmap.mmap(-1, capacity * self._block_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._rows = np.frombuffer(memory, dtype=np.uint8).reshape(capacity, self._block_bytes)
        self._rows.fill(1)
        self._pool = ThreadPoolExecutor(DEPTH)

    def __call__(self, token_ids: Tensor) -> None:
        """Read the rows, with `DEPTH` threads if there are several."""
        items = iter(list(enumerate(sorted(token_ids.tolist()))))
        helpers = [self._pool.submit(self._take, items) for _ in range(min(DEPTH, len(token_ids)) - 1)]
        self._take(items)
        for helper in helpers:
            helper.result()

    def _take(self, items: Iterator[tuple[int, int]]) -> None:
        for position, token_id in items:
            shard, offset = self.files.locate(token_id)
            first = offset // ALIGNMENT * ALIGNMENT
            length = -(-(offset + self.files.row_bytes - first) // ALIGNMENT) * ALIGNMENT
            os.preadv(self.files.descriptor(shard), [self._rows[position, :length].data], first)

    def close(self) -> None:
        """End threads, close files."""
        self._pool.shutdown()
        self.files.close()


class MemmapCopy:
    """What a user without this project would do: index a memory map, row by row."""

    def __init__(self, store: LutStore, capacity: int) -> None:
        """Map the shards."""
        layout = store.layout
        shards = plan_shards(layout)
        self._maps = [
            np.memmap(
                store.lut_dir / shard.file_name,
                dtype=np.uint8,
                mode="r",
                offset=shard.rows_offset(layout),
                shape=(shard.num_tokens, layout.row_bytes),
            )
            for shard in shards
        ]
        self._step, self._rows = shards[0].num_tokens, np.ones((capacity, layout.row_bytes), dtype=np.uint8)

    def __call__(self, token_ids: Tensor) -> None:
        """Copy the rows."""
        for position, token_id in enumerate(token_ids.tolist()):
            self._rows[position] = self._maps[token_id // self._step][token_id % self._step]

    def release_pages(self) -> None:
        """Unmap what was touched, or it would stay warm for every contender."""
        for pages in self._maps:
            release_pages(pages)
