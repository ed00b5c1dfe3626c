"""Which reader a table gets: by name, or by trying what its disk and file system do best."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch

from src.errors import LutError
from src.lut.layout import Shard, TableLayout
from src.lut.readers.aligned import BufferPool
from src.lut.readers.direct import DirectReader, open_direct
from src.lut.readers.memory import MemmapReader, MemoryReader
from src.lut.readers.pread import PreadReader
from src.lut.readers.reader import Arrived, Bytes, Fetch, Reader, Wanted
from src.lut.readers.shard_files import ShardFiles

ReaderName = Literal["auto", "memory", "memmap", "pread", "direct"]
READERS: tuple[ReaderName, ...] = get_args(ReaderName)
PROBE_ROUNDS = 3
PROBE_SIZES = (8, 64)
"""Rows at a time; a request is served as the largest of these that it reaches was fastest. Fewer are always buffered:
one unbuffered read saves a copy and no more than that, and finding out whether a row is resident costs as much."""
DIRECT_ADVANTAGE = 0.87
"""Unbuffered reads must take less than this share of buffered ones, because they leave nothing in the page cache."""


def open_reader(
    name: str, lut_dir: Path, layout: TableLayout, shards: Sequence[Shard], device: torch.device | str = "cpu"
) -> Reader:
    """Return the reader called `name`; LutError names the known ones. `device` is where `memory` keeps the table."""
    if name == "memory":
        return MemoryReader(lut_dir, layout, shards, torch.device(device))
    if name == "memmap":
        return MemmapReader(lut_dir, layout, shards)
    if name == "pread":
        return PreadReader(lut_dir, layout, shards)
    if name == "direct":
        return open_direct(lut_dir, layout, shards) or PreadReader(lut_dir, layout, shards)
    if name == "auto":
        return choose_reader(lut_dir, layout, shards)
    raise LutError(f"reader {name!r} is unknown; choose one of {', '.join(READERS)}")


class MixedReader(Reader):
    """Resident rows from the page cache; cold ones past it where that was faster when the table was opened."""

    def __init__(self, buffered: PreadReader, direct: DirectReader, direct_from: Mapping[int, bool]) -> None:
        """`direct_from` says, by number of rows, whether cold ones are read past the page cache from there on."""
        self._buffered, self._direct = buffered, direct
        self._direct_from = sorted(direct_from.items(), reverse=True)

    def announce(self, token_id: int) -> None:
        """Start reading a single row, which is always buffered."""
        self._buffered.announce(token_id)

    def start(self, wanted: Wanted, rows: Bytes, arrived: Arrived, *, background: bool) -> Fetch:
        """Begin to read as suits the number of rows."""
        if not next((direct for size, direct in self._direct_from if len(wanted) >= size), False):
            return self._buffered.start(wanted, rows, arrived, background=background)
        cold, resident = self._buffered.start_resident(wanted, rows, arrived)
        if not cold:
            return resident
        return _Both(self._direct.start(cold, rows, arrived, background=background), resident)

    def close(self) -> None:
        """Close both."""
        self._buffered.close()
        self._direct.close()


class _Both:
    def __init__(self, first: Fetch, second: Fetch) -> None:
        self._first, self._second = first, second

    def finish(self) -> None:
        """Finish both."""
        self._first.finish()
        self._second.finish()


def choose_reader(lut_dir: Path, layout: TableLayout, shards: Sequence[Shard]) -> Reader:
    """Time a few cold rows, several and many at a time, buffered and unbuffered (some hundredths of a second)."""
    buffered = PreadReader(lut_dir, layout, shards)
    enough = layout.vocab_size >= 2 * PROBE_ROUNDS * PROBE_SIZES[-1]
    if not enough or not hasattr(os, "posix_fadvise") or not hasattr(os, "O_DIRECT"):
        return buffered
    try:
        direct = DirectReader(lut_dir, layout, shards)
    except OSError:  # nobody asked for unbuffered reads, so there is nothing to warn of
        return buffered
    try:
        direct_from = {size: _direct_is_faster(buffered, direct, size, lut_dir, layout, shards) for size in PROBE_SIZES}
    except BaseException:
        buffered.close()
        direct.close()
        raise
    if any(direct_from.values()):
        return MixedReader(buffered, direct, direct_from)
    direct.close()
    return buffered


def _direct_is_faster(
    buffered: Reader, direct: Reader, count: int, lut_dir: Path, layout: TableLayout, shards: Sequence[Shard]
) -> bool:
    """Compare the best of some rounds on rows spread over the table, taken out of the page cache first."""
    files = ShardFiles(lut_dir, layout, shards)
    rows = BufferPool().take(count, layout.row_bytes)
    rows.fill(0)  # touch the pages
    spread = iter(range(0, layout.vocab_size, max(1, layout.vocab_size // (2 * PROBE_ROUNDS * count))))
    best: dict[Reader, float] = {buffered: float("inf"), direct: float("inf")}
    try:
        for _ in range(PROBE_ROUNDS):
            for reader in best:
                wanted = [(next(spread), position) for position in range(count)]
                for token_id, _ in wanted:
                    shard, offset = files.locate(token_id)
                    os.posix_fadvise(files.descriptor(shard), offset, layout.row_bytes, os.POSIX_FADV_DONTNEED)
                best[reader] = min(best[reader], _seconds(partial(_read, reader, wanted, rows)))
    finally:
        files.close()
    return best[direct] < DIRECT_ADVANTAGE * best[buffered]


def _read(reader: Reader, wanted: Wanted, rows: Bytes) -> None:
    reader.start(wanted, rows, _unchecked, background=False).finish()


def _unchecked(*_: int) -> None:
    """Accept any row: a probe looks at the clock alone."""


def _seconds(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
