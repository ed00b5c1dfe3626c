"""Reads past the page cache (O_DIRECT): whole blocks into aligned memory, several at once.

What the cache would hold is left to other programs, and every read costs the device's time, first or repeated.

Which reader a table gets: by name, or by trying what its disk and file system do best.
"""

import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch

from src.errors import LutError
from src.lut.layout import ALIGNMENT, Shard, TableLayout
from src.lut.readers.memory import MemmapReader, MemoryReader
from src.lut.readers.pread import PreadReader
from src.lut.readers.reader import (
    Arrived,
    BufferPool,
    Bytes,
    Fetch,
    Reader,
    ShardFiles,
    Wanted,
    WorkerPool,
    aligned_bytes,
    is_aligned,
)

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
