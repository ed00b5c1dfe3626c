"""Reads past the page cache (O_DIRECT): whole blocks into aligned memory, several at once.

The page cache is left to other programs, and repeated reads are as slow as the first.
"""

import mmap
import os
import warnings
from functools import partial
from pathlib import Path

import numpy as np

from src.lut.layout import ALIGNMENT, TableLayout
from src.lut.readers.pread import PreadReader
from src.lut.readers.reader import Arrived, Bytes, Finish, Reader, ShardFiles, Wanted, WorkerPool, register_reader

DEPTH = 16
"""Threads, each with a read under way."""


class DirectReader(Reader):
    """Unbuffered reads by up to `DEPTH` threads."""

    def __init__(self, lut_dir: Path, layout: TableLayout) -> None:
        """Open every shard; OSError where the file system refuses unbuffered reads."""
        self._files, self._pool = ShardFiles(lut_dir, layout, flags=os.O_DIRECT), WorkerPool(DEPTH)
        self._scratch_bytes = -(-(layout.row_bytes + ALIGNMENT) // ALIGNMENT) * ALIGNMENT
        self._scratch: list[Bytes] = []
        try:
            os.preadv(self._files.descriptors[0], [aligned_bytes(ALIGNMENT).data], 0)
        except OSError:
            self._files.close()
            raise

    def start(self, wanted: Wanted, rows: Bytes, arrived: Arrived) -> Finish | None:
        return self._pool.start(partial(self._read, rows, arrived), sorted(wanted))  # in order of the file

    def close(self) -> None:
        self._pool.close()
        self._files.close()
        self._scratch.clear()

    def _read(self, rows: Bytes, arrived: Arrived, pair: tuple[int, int]) -> None:
        """Read the blocks around a row and copy the row out of them; the file's last block may end short."""
        token_id, position = pair
        before = self._files.locate(token_id)[1] % ALIGNMENT
        needed = before + self._files.row_bytes
        blocks = -(-needed // ALIGNMENT) * ALIGNMENT
        try:
            scratch = self._scratch.pop()  # atomic, so two threads never share one
        except IndexError:
            scratch = aligned_bytes(self._scratch_bytes)
        done = 0
        while done < needed:
            count = self._files.read(token_id, scratch.data[done:blocks], done - before)
            done += count
            if count == 0 or (done < needed and done % 512):  # sectors are whole except at the end of a file
                raise self._files.truncated(token_id)
        rows[position] = scratch[before:needed]
        self._scratch.append(scratch)
        arrived(token_id, position)


def aligned_bytes(size: int) -> Bytes:
    """Return `size` zeroed bytes (at least one) that start on a page; they cost memory when first touched."""
    memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # not shared with a forked child
    return np.frombuffer(memory, dtype=np.uint8)


def open_direct(lut_dir: Path, layout: TableLayout) -> DirectReader | PreadReader:
    """Return a direct reader, or a buffered one with a warning where unbuffered reads are not possible."""
    try:
        if hasattr(os, "O_DIRECT"):
            return DirectReader(lut_dir, layout)
        reason = "this system has no O_DIRECT"
    except OSError as error:
        reason = f"its file system refuses O_DIRECT ({error.strerror})"
    warnings.warn(f"{lut_dir}: {reason}; reading through the page cache instead", stacklevel=2)
    return PreadReader(lut_dir, layout)


register_reader("direct", "past the page cache, with O_DIRECT", lambda lut_dir, layout, _: open_direct(lut_dir, layout))
