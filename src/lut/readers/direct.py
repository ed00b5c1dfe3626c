"""Reads past the page cache (O_DIRECT): whole blocks into aligned memory, several at once.

What the cache would hold is left to other programs, and every read costs the device's time, first or repeated.
"""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from src.lut.layout import ALIGNMENT, Shard, TableLayout
from src.lut.readers.aligned import aligned_bytes, is_aligned
from src.lut.readers.reader import Arrived, Bytes, Fetch, Reader, Wanted
from src.lut.readers.shard_files import ShardFiles
from src.lut.readers.workers import WorkerPool

RUN_BYTES = 2**20
"""Rows that lie side by side are read together up to this size."""


class Run(NamedTuple):
    """Rows that are neighbours in a file."""

    shard: int
    offset: int
    wanted: list[tuple[int, int]]


class DirectReader(Reader):
    """Unbuffered reads by up to `depth` threads, in order of the file."""

    def __init__(self, lut_dir: Path, layout: TableLayout, shards: Sequence[Shard], depth: int = 16) -> None:
        """Open every shard; OSError where the file system refuses unbuffered reads."""
        self._files = ShardFiles(lut_dir, layout, shards, flags=os.O_DIRECT)
        self._pool = WorkerPool(depth)
        self._scratch: list[Bytes] = []
        try:
            os.preadv(self._files.descriptor(0), [aligned_bytes(ALIGNMENT).data], 0)
        except OSError:
            self._files.close()
            raise

    def start(self, wanted: Wanted, rows: Bytes, arrived: Arrived, *, background: bool) -> Fetch:
        """Sort, merge neighbours and hand the runs to the threads."""
        in_place = self._files.row_bytes % ALIGNMENT == 0 and is_aligned(rows)

        def read(run: Run) -> None:
            if in_place:
                self._read_in_place(run, rows)
            else:
                self._read_and_copy(run, rows)
            for token_id, position in run.wanted:
                arrived(token_id, position)

        return self._pool.start(read, self._runs(wanted), background=background)

    def close(self) -> None:
        """End threads, close files."""
        self._pool.close()
        self._files.close()
        self._scratch.clear()

    def _runs(self, wanted: Wanted) -> list[Run]:
        runs: list[Run] = []
        row_bytes = self._files.row_bytes
        for pair in sorted(wanted):
            shard, offset = self._files.locate(pair[0])
            last = runs[-1] if runs else None
            if (
                last is not None
                and last.shard == shard
                and last.offset + len(last.wanted) * row_bytes == offset
                and (len(last.wanted) + 1) * row_bytes <= RUN_BYTES
            ):
                last.wanted.append(pair)
            else:
                runs.append(Run(shard, offset, [pair]))
        return runs

    def _read_in_place(self, run: Run, rows: Bytes) -> None:
        targets = [rows[position].data for _, position in run.wanted]
        self._read_blocks(run, targets, run.offset, sum(len(target) for target in targets))

    def _read_and_copy(self, run: Run, rows: Bytes) -> None:
        """Read the blocks around the rows and copy the rows out of them; the file's last block may end short."""
        row_bytes = self._files.row_bytes
        first = run.offset // ALIGNMENT * ALIGNMENT
        needed = run.offset + len(run.wanted) * row_bytes - first
        block_bytes = -(-needed // ALIGNMENT) * ALIGNMENT
        scratch = self._take_scratch(block_bytes)
        self._read_blocks(run, [scratch[:block_bytes].data], first, needed)
        start = run.offset - first
        for _, position in run.wanted:
            rows[position] = scratch[start : start + row_bytes]
            start += row_bytes
        self._scratch.append(scratch)

    def _read_blocks(self, run: Run, targets: list[memoryview], offset: int, needed: int) -> None:
        """Fill `targets`; the kernel may stop early, but before `needed` bytes only at the end of a short file."""
        done = 0
        while done < needed:
            count = self._files.read(run.shard, targets, offset + done)
            done += count
            if count == 0 or (done < needed and done % 512):
                raise self._files.truncated(run.shard, run.offset)
            targets = _skip(targets, count)

    def _take_scratch(self, size: int) -> Bytes:
        try:
            scratch = self._scratch.pop()  # atomic, so two threads never share one
        except IndexError:
            scratch = aligned_bytes(RUN_BYTES + 2 * ALIGNMENT)
        return scratch if len(scratch) >= size else aligned_bytes(size)


def open_direct(lut_dir: Path, layout: TableLayout, shards: Sequence[Shard]) -> DirectReader | None:
    """Return a direct reader, or None and a warning where there is no unbuffered reading."""
    try:
        if hasattr(os, "O_DIRECT"):
            return DirectReader(lut_dir, layout, shards)
        reason = "this system has no O_DIRECT"
    except OSError as error:
        reason = f"its file system refuses O_DIRECT ({error.strerror})"
    warnings.warn(f"{lut_dir}: {reason}; reading through the page cache instead", stacklevel=2)
    return None


def _skip(targets: list[memoryview], count: int) -> list[memoryview]:
    while targets and count >= len(targets[0]):
        count -= len(targets[0])
        targets = targets[1:]
    return [targets[0][count:], *targets[1:]] if targets and count else targets
