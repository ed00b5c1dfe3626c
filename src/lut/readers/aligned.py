"""Memory that unbuffered reads accept, and a pool of it that is reused as soon as nobody can see it."""

import mmap
import sys
import threading

import numpy as np

from src.lut.layout import ALIGNMENT
from src.lut.readers.reader import Bytes
from src.lut.readers.workers import after_fork_in_child

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
