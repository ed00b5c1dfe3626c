"""Positioned reads through the page cache.

On Linux a read with RWF_NOWAIT copies a row that is resident, in a few microseconds, and otherwise returns at once
*after starting the read*: every cold row of a request is then on its way without a thread, and a second, blocking
read collects it. Elsewhere threads block in its place.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from src.lut.layout import Shard, TableLayout
from src.lut.readers.reader import Arrived, Bytes, Done, Fetch, Wanted
from src.lut.readers.shard_files import ShardFiles
from src.lut.readers.workers import WorkerPool

IN_FLIGHT_BYTES = 8 * 2**20
"""Reads started ahead of their collection: deep enough for any device, small beside a tight memory limit."""
PROBE_BYTES = 4096


class PreadReader:
    """Buffered reads, one system call per resident row."""

    def __init__(self, lut_dir: Path, layout: TableLayout, shards: Sequence[Shard], depth: int = 16) -> None:
        """Open every shard; `depth` threads serve systems without RWF_NOWAIT."""
        self._files = ShardFiles(lut_dir, layout, shards)
        self._pool = WorkerPool(depth)
        self._window = max(8, IN_FLIGHT_BYTES // layout.row_bytes)
        if hasattr(os, "posix_fadvise"):  # reading ahead would fetch rows that nobody asked for
            for shard in range(len(shards)):
                os.posix_fadvise(self._files.descriptor(shard), 0, 0, os.POSIX_FADV_RANDOM)
        self._nowait = _nowait_flag(self._files.descriptor(0))

    def start(self, wanted: Wanted, rows: Bytes, arrived: Arrived, *, background: bool) -> Fetch:
        """Copy resident rows; start the reads of the others."""
        read = _Reads(self._files, self._nowait, rows, arrived)
        if self._nowait is None:
            return self._pool.start(read.collect, wanted, background=background)
        ahead = [pair for pair in wanted[: self._window] if not read.try_now(*pair)]
        if not ahead and len(wanted) <= self._window:
            return Done()
        return _Collection(read, ahead, wanted[self._window :])

    def start_resident(self, wanted: Wanted, rows: Bytes, arrived: Arrived) -> tuple[Wanted, Fetch]:
        """Copy resident rows; return those that are wholly cold, whose reads were not started, and a fetch of the rest.

        A row is judged by its first page, which this brings in: a cold row that is wanted again then comes through
        the page cache and stays there.
        """
        read = _Reads(self._files, self._nowait, rows, arrived)
        if self._nowait is None:
            return wanted, Done()
        cold = [pair for pair in wanted if not read.first_page_resident(pair[0])]
        distinct = set(cold)
        warm = [pair for pair in wanted if pair not in distinct] if distinct else wanted
        return cold, _Collection(read, [pair for pair in warm if not read.try_now(*pair)], ())

    def close(self) -> None:
        """Close files, end threads."""
        self._pool.close()
        self._files.close()


class _Reads:
    """Reads into one target."""

    def __init__(self, files: ShardFiles, nowait: int | None, rows: Bytes, arrived: Arrived) -> None:
        self._files, self._nowait, self._arrived = files, nowait or 0, arrived
        self._target, self._row_bytes = rows.reshape(-1).data, files.row_bytes

    def try_now(self, token_id: int, position: int) -> bool:
        """Copy the row if all of it is resident; otherwise its read is under way when this returns."""
        shard, offset = self._files.locate(token_id)
        start = position * self._row_bytes
        target = self._target[start : start + self._row_bytes]
        try:
            count = os.preadv(self._files.descriptor(shard), [target], offset, self._nowait)
        except BlockingIOError:
            return False
        if count < self._row_bytes:
            return False
        self._arrived(token_id, position)
        return True

    def first_page_resident(self, token_id: int) -> bool:
        shard, offset = self._files.locate(token_id)
        page = bytearray(min(PROBE_BYTES, self._row_bytes))
        try:
            return os.preadv(self._files.descriptor(shard), [page], offset, self._nowait) > 0
        except BlockingIOError:
            return False

    def collect(self, pair: tuple[int, int]) -> None:
        """Read the row, waiting for the disk if need be."""
        token_id, position = pair
        shard, offset = self._files.locate(token_id)
        start = position * self._row_bytes
        self._files.read_row(shard, offset, self._target[start : start + self._row_bytes])
        self._arrived(token_id, position)


class _Collection:
    """Rows whose reads are under way, and a tail whose reads start as the first ones are collected."""

    def __init__(self, read: _Reads, ahead: Wanted, tail: Wanted) -> None:
        self._read, self._ahead, self._tail = read, list(ahead), iter(tail)

    def finish(self) -> None:
        """Collect in order; one collected row lets the next cold one start."""
        collected = 0
        self._start_next()
        while collected < len(self._ahead):
            self._read.collect(self._ahead[collected])
            collected += 1
            self._start_next()

    def _start_next(self) -> None:
        for pair in self._tail:
            if not self._read.try_now(*pair):
                self._ahead.append(pair)
                return


def _nowait_flag(descriptor: int) -> int | None:
    """Return RWF_NOWAIT where system and file system know it (tmpfs answers EOPNOTSUPP, macOS has no such flag)."""
    flag = getattr(os, "RWF_NOWAIT", None)
    if flag is None:
        return None
    try:
        os.preadv(descriptor, [bytearray(1)], 0, flag)
    except BlockingIOError:
        return flag
    except OSError:
        return None
    return flag
