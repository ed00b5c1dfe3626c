"""Positioned reads through the page cache: what `auto` stands for.

On Linux a read with RWF_NOWAIT copies a row that is in the page cache, in a few microseconds, and otherwise returns at
once *after starting the read*: every cold row of a request is then being read without a thread, and a second, blocking
read collects it. Other systems use threads.
"""

import os
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from src.lut.layout import TableLayout
from src.lut.readers.reader import Arrived, Bytes, Finish, Reader, ShardFiles, Wanted, WorkerPool, register_reader

IN_FLIGHT_BYTES = 8 * 2**20
"""Reads started ahead of their collection: deep enough for any device, little under a tight memory limit."""
MANY_ROWS = 64
"""From so many rows on, a few threads share the copying, which then takes longer than the disk."""
COPYING_THREADS = 4
DEPTH = 16
"""Threads on systems without RWF_NOWAIT."""


class PreadReader(Reader):
    """Buffered reads, one system call per row in the page cache."""

    def __init__(self, lut_dir: Path, layout: TableLayout) -> None:
        self._files, self._pool = ShardFiles(lut_dir, layout), WorkerPool(DEPTH)
        self._row_bytes = layout.row_bytes
        self._window = max(8, IN_FLIGHT_BYTES // layout.row_bytes)
        if hasattr(os, "posix_fadvise"):  # read-ahead would fetch unwanted rows
            for descriptor in self._files.descriptors:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        self._nowait = _nowait_flag(self._files.descriptors[0])

    def start(self, wanted: Wanted, rows: Bytes, arrived: Arrived) -> Finish | None:
        target = rows.reshape(-1).data
        if self._nowait is None:
            return self._pool.start(lambda pair: self._collect(pair, target, arrived), wanted)
        if len(wanted) > MANY_ROWS:
            parts = min(COPYING_THREADS, os.cpu_count() or 1)
            read = partial(self._read, target=target, arrived=arrived, window=max(1, self._window // parts))
            return self._pool.start(lambda share: _exhaust(read(share)), [wanted[part::parts] for part in range(parts)])
        reading = self._read(wanted, target, arrived, self._window)
        return None if next(reading, "done") == "done" else partial(_exhaust, reading)

    def close(self) -> None:
        self._pool.close()
        self._files.close()

    def _read(self, wanted: Wanted, target: memoryview, arrived: Arrived, window: int) -> Iterator[None]:
        """Copy cached rows and keep up to `window` reads going; pause before each wait for the disk."""
        reading: deque[tuple[int, int]] = deque()
        for token_id, position in wanted:
            row = target[position * self._row_bytes : (position + 1) * self._row_bytes]
            if self._files.read(token_id, row, flags=self._nowait or 0) == self._row_bytes:
                arrived(token_id, position)
                continue
            reading.append((token_id, position))
            if len(reading) == window:
                yield
                self._collect(reading.popleft(), target, arrived)
        while reading:
            yield
            self._collect(reading.popleft(), target, arrived)

    def _collect(self, pair: tuple[int, int], target: memoryview, arrived: Arrived) -> None:
        token_id, position = pair
        self._files.read_row(token_id, target[position * self._row_bytes : (position + 1) * self._row_bytes])
        arrived(token_id, position)


def _exhaust(reading: Iterator[None]) -> None:
    for _ in reading:
        pass


def _nowait_flag(descriptor: int) -> int | None:
    """Return RWF_NOWAIT where system and file system support it (tmpfs answers EOPNOTSUPP, macOS has no such flag)."""
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


for _name, _help in (("auto", "same as pread"), ("pread", "through the page cache")):
    register_reader(_name, _help, lambda lut_dir, layout, _: PreadReader(lut_dir, layout))
