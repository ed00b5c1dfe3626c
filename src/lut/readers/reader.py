"""What a reader is: it starts to fetch rows, and whoever needs them finishes the fetch.

The open shards of a table: where a row lies in them, and reads that are whole or an error.

Threads for reads that block, and work that they share with whoever waits for it.

Memory that unbuffered reads accept, and a pool of it that is reused as soon as nobody can see it.
"""

import mmap
import os
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from src.errors import LutError, LutFormatError
from src.lut.layout import ALIGNMENT, Shard, TableLayout, tokens_per_shard

Bytes = NDArray[np.uint8]
Wanted = Sequence[tuple[int, int]]
"""Pairs of (token id in [0, V), row of the target that it goes to); an id may be wanted twice."""
Arrived = Callable[[int, int], None]
"""Told (token id, target row) of each row that is complete, on whichever thread completed it; may raise."""


class Fetch(Protocol):
    """Rows on their way."""

    def finish(self) -> None:
        """Return when every row has arrived; raises what reading raised. Called once."""
        ...


class Reader(Protocol):
    """Fetches rows; safe to use from several threads and after a fork."""

    def announce(self, token_id: int) -> None:
        """Take the hint that this row is asked for next, before there is memory for it; by default do nothing."""

    def start(self, wanted: Wanted, rows: Bytes, arrived: Arrived, *, background: bool) -> Fetch:
        """Begin to fill `rows` (U, row_bytes) as `wanted` says.

        With `background` the caller has other work before it calls `finish`, so the reading should go on without it.
        """
        ...

    def close(self) -> None:
        """Let go of files and threads; reading afterwards raises LutError."""
        ...


class Done:
    """A fetch that was complete when it started."""

    def finish(self) -> None:
        """Return at once."""


class ShardFiles:
    """Descriptors of every shard; positioned reads share them between threads and with forked children."""

    def __init__(self, lut_dir: Path, layout: TableLayout, shards: Sequence[Shard], flags: int = 0) -> None:
        """Open the shards for reading, with extra `flags` of `os.open`."""
        self.row_bytes = layout.row_bytes
        self.paths = [lut_dir / shard.file_name for shard in shards]
        self._tokens_per_shard = tokens_per_shard(layout)
        self._offsets = [shard.rows_offset(layout) for shard in shards]
        self._descriptors: list[int] = []
        try:
            for path in self.paths:
                self._descriptors.append(os.open(path, os.O_RDONLY | flags))
        except OSError:
            self.close()
            raise

    def locate(self, token_id: int) -> tuple[int, int]:
        """Return the shard of an id and the byte of that file where its row starts."""
        shard, row = divmod(token_id, self._tokens_per_shard)
        return shard, self._offsets[shard] + row * self.row_bytes

    def descriptor(self, shard: int) -> int:
        """Return an open descriptor; LutError after `close`."""
        if not self._descriptors:
            raise LutError(f"{self.paths[shard].parent}: the table is closed; open it again to read")
        return self._descriptors[shard]

    def read(self, shard: int, targets: Sequence[bytearray | memoryview], offset: int, flags: int = 0) -> int:
        """Read once, as `os.preadv` does; a disk that fails raises LutError with the file's name."""
        try:
            return os.preadv(self.descriptor(shard), targets, offset, flags)
        except BlockingIOError:  # the answer to RWF_NOWAIT, not a failure
            raise
        except OSError as error:
            raise LutError(
                f"{self.paths[shard]}: reading from byte {offset:,} failed ({error.strerror}); check the disk and copy "
                "or rebuild the table"
            ) from error

    def read_row(self, shard: int, offset: int, target: memoryview) -> None:
        """Fill `target` from byte `offset` on, however often the kernel stops short."""
        while target:
            count = self.read(shard, [target], offset)
            if count == 0:
                raise self.truncated(shard, offset)
            target, offset = target[count:], offset + count

    def truncated(self, shard: int, offset: int) -> LutFormatError:
        """Return the error for a file that ends where a row should be."""
        size = os.fstat(self.descriptor(shard)).st_size
        return LutFormatError(
            f"{self.paths[shard]}: {size:,} bytes long while the row at byte {offset:,} was read, so it was truncated "
            "after it was opened; copy the table again or rebuild it"
        )

    def close(self) -> None:
        """Close the files; harmless when done twice."""
        while self._descriptors:
            os.close(self._descriptors.pop())


Item = TypeVar("Item")


def after_fork_in_child(reset: Callable[[], None]) -> None:
    """Call the bound method `reset` in every forked child, as long as its object lives.

    Threads do not survive a fork and a lock that another thread held stays held for ever.
    """
    method = weakref.WeakMethod(reset)

    def call() -> None:
        if (alive := method()) is not None:
            alive()

    os.register_at_fork(after_in_child=call)


class SharedWork(Generic[Item]):
    """Items that several threads take from one iterator, so that none of them idles while another has a queue."""

    def __init__(self, perform: Callable[[Item], None], items: Sequence[Item]) -> None:
        """Nothing runs until a thread calls `take`."""
        self._perform, self._all, self._process = perform, items, os.getpid()
        self._left = iter(items)  # `next` on it is atomic
        self._helpers: list[Future[None]] = []

    def help_with(self, helpers: list["Future[None]"]) -> None:
        """Remember the helpers that were hired for this work."""
        self._helpers = helpers

    def take(self) -> None:
        """Perform items until none is left."""
        for item in self._left:
            self._perform(item)

    def finish(self) -> None:
        """Do what is left, then wait for items that others still have in hand; raises what any of them raised."""
        if os.getpid() != self._process:  # started before a fork: what helpers had in hand never arrives here
            self._left, self._helpers = iter(self._all), []
        self.take()
        for helper in self._helpers:
            if not helper.cancel():  # one that never ran has nothing in hand
                helper.result()


class WorkerPool:
    """Up to `depth` threads, started on first use and anew in a forked child."""

    def __init__(self, depth: int) -> None:
        """Start no thread yet."""
        self.depth = depth
        self._closed = False
        self._reset()
        after_fork_in_child(self._reset)

    def _reset(self) -> None:
        self._lock, self._executor = threading.Lock(), None

    def start(self, perform: Callable[[Item], None], items: Sequence[Item], *, background: bool) -> SharedWork[Item]:
        """Begin to `perform` items in parallel; without `background` the caller is one of the workers."""
        work = SharedWork(perform, items)
        helpers = min(self.depth, len(items)) - (not background)
        if helpers > 0:
            executor = self._running()
            work.help_with([executor.submit(work.take) for _ in range(helpers)])
        return work

    def _running(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._closed:
                raise LutError("the table is closed; open it again to read")
            if self._executor is None:
                self._executor = ThreadPoolExecutor(self.depth, thread_name_prefix="lut-read")
            return self._executor

    def close(self) -> None:
        """Stop the threads when they have finished what they have in hand."""
        with self._lock:
            self._closed = True
            if self._executor is not None:
                self._executor.shutdown(cancel_futures=True)
                self._executor = None


KEPT_BUFFERS = 4


def aligned_bytes(size: int) -> Bytes:
    """Return `size` zeroed bytes (at least one) that start on a page; they cost memory when first touched."""
    memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # not shared with a forked child
    return np.frombuffer(memory, dtype=np.uint8)


def is_aligned(rows: Bytes) -> bool:
    """Whether unbuffered reads can go straight into the array."""
    return rows.ctypes.data % ALIGNMENT == 0


def _references_to_a_local() -> int:
    alone = object()
    return sys.getrefcount(alone)


_UNSEEN = _references_to_a_local()
"""References that this interpreter counts to what only a local name holds: 2, or 1 from Python 3.14 on."""


class BufferPool:
    """Reuses buffers between requests: fresh pages cost a fault per 4 KiB, a few percent of a decode step.

    A buffer is free again when no tensor or array refers to it, so rows that a caller keeps are never overwritten.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._buffers: list[Bytes] = []
        self._reset_lock()
        after_fork_in_child(self._reset_lock)

    def _reset_lock(self) -> None:
        self._lock = threading.Lock()

    def take(self, num_rows: int, row_bytes: int) -> Bytes:
        """Return (num_rows, row_bytes) bytes with undefined contents."""
        size = num_rows * row_bytes
        with self._lock:
            return self._free(size)[:size].reshape(num_rows, row_bytes)

    def _free(self, size: int) -> Bytes:
        fitting: Bytes | None = None
        kept: list[Bytes] = []
        while self._buffers:
            buffer = self._buffers.pop()
            in_use = sys.getrefcount(buffer) > _UNSEEN
            if in_use or len(buffer) >= size:
                kept.append(buffer)
            if not in_use and len(buffer) >= size and (fitting is None or len(buffer) < len(fitting)):
                fitting = buffer
        if fitting is None:
            fitting = aligned_bytes(size)
            kept.append(fitting)
        self._buffers = kept[-KEPT_BUFFERS:]
        return fitting
