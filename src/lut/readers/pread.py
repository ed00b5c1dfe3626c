"""Positioned reads through the page cache.

On Linux a read with RWF_NOWAIT copies a row that is resident, in a few microseconds, and otherwise returns at once
*after starting the read*: every cold row of a request is then on its way without a thread, and a second, blocking
read collects it. Elsewhere threads block in its place.
"""

import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from src.lut.layout import Shard, TableLayout
from src.lut.readers.reader import Arrived, Bytes, Done, Fetch, Reader, ShardFiles, Wanted, WorkerPool

IN_FLIGHT_BYTES = 8 * 2**20
"""Reads started ahead of their collection: deep enough for any device, small beside a tight memory limit."""
PROBE_BYTES = 4096
MANY_ROWS = 64
"""From so many rows on, a few threads share the copying: it, not the disk, is what then takes time."""
COPYING_THREADS = 4


class PreadReader(Reader):
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

    def announce(self, token_id: int) -> None:
        """Have the kernel bring the row into the page cache: the disk then works while the request is prepared."""
        if hasattr(os, "posix_fadvise"):
            shard, offset = self._files.locate(token_id)
            os.posix_fadvise(self._files.descriptor(shard), offset, self._files.row_bytes, os.POSIX_FADV_WILLNEED)

    def start(self, wanted: Wanted, rows: Bytes, arrived: Arrived, *, background: bool) -> Fetch:
        """Copy resident rows; start the reads of the others."""
        read = _Reads(self._files, self._nowait, rows, arrived)
        if len(wanted) == 1 and not background:
            return _Single(read, wanted[0])
        if self._nowait is None:
            return self._pool.start(read.collect, wanted, background=background)
        if len(wanted) > MANY_ROWS:
            parts = min(COPYING_THREADS, os.cpu_count() or 1)
            window = max(1, self._window // parts)
            shares = [wanted[part::parts] for part in range(parts)]
            return self._pool.start(
                lambda share: _Collection(read, share, window).finish(), shares, background=background
            )
        collection = _Collection(read, wanted, self._window)
        return collection if collection.start() else Done()

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
        resident = _Collection(read, warm, self._window)
        return cold, resident if resident.start() else Done()

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
            count = self._files.read(shard, [target], offset, self._nowait)
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
            return self._files.read(shard, [page], offset, self._nowait) > 0
        except BlockingIOError:
            return False

    def collect(self, pair: tuple[int, int]) -> None:
        """Read the row, waiting for the disk if need be."""
        token_id, position = pair
        shard, offset = self._files.locate(token_id)
        start = position * self._row_bytes
        self._files.read_row(shard, offset, self._target[start : start + self._row_bytes])
        self._arrived(token_id, position)


class _Single:
    """One row that is read when it is waited for."""

    def __init__(self, read: _Reads, pair: tuple[int, int]) -> None:
        self._read, self._pair = read, pair

    def finish(self) -> None:
        """Read it."""
        self._read.collect(self._pair)


class _Collection:
    """Rows in order: resident ones are copied on the way, up to `window` reads of cold ones are under way."""

    def __init__(self, read: _Reads, wanted: Wanted, window: int) -> None:
        self._read, self._left, self._window = read, iter(wanted), window
        self._under_way: deque[tuple[int, int]] = deque()

    def start(self) -> bool:
        """Start reads until the window is full; whether any row is missing."""
        while len(self._under_way) < self._window:
            pair = next(self._left, None)
            if pair is None:
                break
            if not self._read.try_now(*pair):
                self._under_way.append(pair)
        return bool(self._under_way)

    def finish(self) -> None:
        """Collect the reads in order, starting another for each."""
        while self.start():
            self._read.collect(self._under_way.popleft())


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
