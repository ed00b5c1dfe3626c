"""`LutStore`: a table on disk, opened and checked, that returns rows by token id.

Rows are requested as soon as their ids are known and waited for as late as possible. Knows nothing of models.

U token ids, L layers, E experts, D hidden.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from weakref import finalize

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from src.errors import LutError
from src.lut.cache import RowCache
from src.lut.layout import ALIGNMENT, TableLayout, check_rows, row_checksum
from src.lut.manifest import Manifest, read_manifest
from src.lut.readers import READERS, Reader, ResidentTable
from src.lut.readers.reader import Bytes, Finish, reset_after_fork, zero_row
from src.lut.scan import check_shard, read_checksums, read_row_ids, read_token_counts, row_numbers


@dataclass
class ReadStats:
    """What a store has done since it was opened. Not exact where threads share the store."""

    requests: int = 0
    rows: int = 0
    """Rows requested."""
    bytes: int = 0
    """Bytes of rows that the reader fetched; those from the row cache or a resident table are not among them."""
    cache_hits: int = 0
    cache_misses: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of rows that the row cache held; 0 without one."""
        return self.cache_hits / max(1, self.cache_hits + self.cache_misses)


class RowRequest:
    """Rows that are being read. Every method waits; after a failed read each raises its error again."""

    def __init__(self, layout: TableLayout, codes: Tensor, finish: Finish | None) -> None:
        """`codes` (U, row_bytes) are complete once `finish` returns, or already where it is None."""
        self._layout, self._codes, self._finish = layout, codes, finish
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._layers: Callable[[int], Tensor] | None = None

    def codes(self) -> Tensor:
        """Return the stored bytes (U, row_bytes) uint8, checked."""
        with self._lock:
            if self._error is not None:
                raise self._error
            if self._finish is not None:
                finish, self._finish = self._finish, None
                try:
                    finish()
                except BaseException as error:
                    self._error = error
                    raise
        return self._codes

    def wait(self) -> Tensor:
        """Return the rows (U, L, E, D) in the codec's dtype."""
        if self._layout.codec.is_view:
            rows = decode(self._codes, self._layout)  # a view, made while the disk works
            self.codes()
            return rows
        return decode(self.codes(), self._layout)

    def layer(self, layer: int) -> Tensor:
        """Return one layer's rows (U, E, D), decoding no other: packed rows stay packed until they are used."""
        if self._layers is None:
            self._layers = layer_decoder(self.codes(), self._layout)
        return self._layers(layer)


def decode(codes: Tensor, layout: TableLayout) -> Tensor:
    """Turn stored bytes (U, row_bytes) into rows (U, L, E, D)."""
    return layout.codec.decode(_vectors(codes, layout), layout.hidden_size)


def layer_decoder(codes: Tensor, layout: TableLayout) -> Callable[[int], Tensor]:
    """Return a function from a layer to its rows (U, E, D), which decodes packed rows when it is called."""
    codec, vectors = layout.codec, _vectors(codes, layout)
    if codec.is_view:  # one view serves all layers
        return codec.decode(vectors, layout.hidden_size).unbind(1).__getitem__
    return lambda layer: codec.decode(vectors[:, layer], layout.hidden_size)


def _vectors(codes: Tensor, layout: TableLayout) -> Tensor:
    return codes.view(-1, layout.num_layers, layout.num_experts, layout.vector_bytes)


class Gate:
    """Counts the threads inside. `close` waits for them to leave; entering then raises LutError(`closed_message`)."""

    def __init__(self, closed_message: str) -> None:
        self._message, self._closed = closed_message, False
        self.reset_after_fork()
        reset_after_fork(self)

    def reset_after_fork(self) -> None:
        self._inside, self._changed = 0, threading.Condition()

    def __enter__(self) -> None:
        with self._changed:
            if self._closed:
                raise LutError(self._message)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._inside -= 1
            if self._closed:
                self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._inside)


class BufferPool:
    """Memory for rows, reused once no tensor refers to it: a page of fresh memory costs a page fault.

    It starts on a page: the kernel copies 1.25 times as fast there as to the odd address that NumPy picks.
    """

    def __init__(self, row_bytes: int) -> None:
        self._row_bytes, self._free = row_bytes, list[Bytes]()

    def take(self, num_rows: int) -> Bytes:
        """Return at least (num_rows, row_bytes) uint8."""
        try:
            memory = self._free.pop()  # atomic, so two threads never share one
        except IndexError:
            memory = None
        if memory is not None and len(memory) >= num_rows:
            return memory
        size = num_rows * self._row_bytes
        memory = np.empty(size + ALIGNMENT, dtype=np.uint8)
        start = -memory.ctypes.data % ALIGNMENT
        return memory[start : start + size].reshape(num_rows, self._row_bytes)

    def lend(self, memory: Bytes, rows: Bytes) -> Tensor:
        """Return `rows`, a view of `memory`, as a tensor; the memory is reused when no tensor refers to it."""
        finalize(rows, self._give_back, memory).atexit = False
        return torch.from_numpy(rows)

    def _give_back(self, memory: Bytes) -> None:
        if len(self._free) < SPARE_BUFFERS:
            self._free.append(memory)


SPARE_BUFFERS = 2
"""Buffers kept: one is read into while another is used."""
SEED_ROWS = 256
"""Rows read at a time when the cache is seeded."""


class LutStore:
    """A finished table. Share it between threads and with forked children; close it or use it as a context manager."""

    def __init__(
        self,
        lut_dir: Path,
        manifest: Manifest,
        reader: str,
        cache_mb: float,
        verify_rows: bool,
        device: torch.device | str,
    ) -> None:
        """Use `LutStore.open`, which checks the directory first."""
        self.lut_dir, self.manifest, self.layout = lut_dir, manifest, manifest.layout
        self._gate = Gate(f"{lut_dir}: the store is closed; open it again to read")
        self._stats, self._buffers = ReadStats(), BufferPool(self.layout.row_bytes)
        self.row_ids = read_row_ids(lut_dir, manifest)
        """The ids that have a row (R,), in ascending order; None: all of them."""
        self._zero_row = None if self.row_ids is None else zero_row(self.layout).numpy()
        self._checksums = read_checksums(lut_dir, self.layout) if verify_rows else None
        self.reader: Reader | ResidentTable = READERS[reader].open(lut_dir, self.layout, torch.device(device))
        self._cache: RowCache | None = None
        self.device = torch.device("cpu") if not isinstance(self.reader, ResidentTable) else self.reader.table.device
        """Where rows arrive."""
        try:
            if not isinstance(self.reader, ResidentTable):
                self._cache = self._seeded_cache(self.reader, cache_mb)
            elif self._checksums is not None:
                self._verify_table(self.reader.table, self._checksums)
        except BaseException:
            self.reader.close()
            raise

    @classmethod
    def open(
        cls,
        lut_dir: Path | str,
        *,
        reader: str = "auto",
        cache_mb: float = 0,
        verify_rows: bool = True,
        device: torch.device | str = "cpu",
    ) -> "LutStore":
        """Open the table in `lut_dir`.

        Args:
            lut_dir: a directory with a manifest.
            reader: a name in `src.lut.readers.READERS`.
            cache_mb: MiB of rows kept in memory, at first those that training saw most; `memory` needs none.
            verify_rows: check the CRC-32 of every row that is read.
            device: where `memory` keeps the table; the other readers deliver to the CPU.

        Raises:
            LutError: there is no finished table here, or the reader is unknown.
            LutFormatError: files are missing, resized or damaged.
        """
        if reader not in READERS:
            raise LutError(f"reader {reader!r} is unknown; choose one of {', '.join(READERS)}")
        if cache_mb < 0:
            raise LutError(f"cache_mb {cache_mb}, but it must not be negative")
        manifest = read_manifest(Path(lut_dir))
        for shard in manifest.shards:
            check_shard(Path(lut_dir), shard, manifest.layout)
        return cls(Path(lut_dir), manifest, reader, cache_mb, verify_rows, device)

    @property
    def stats(self) -> ReadStats:
        """What was read since the table was opened; seeding the cache is not counted."""
        return replace(self._stats)

    def request(self, token_ids: Tensor, out: Tensor | None = None) -> RowRequest:
        """Start reading the rows of `token_ids` (U,) int64 and return at once; an id without a row gets zeros.

        `out` is an optional contiguous (U, row_bytes) uint8 CPU buffer to read into. Raises IndexError naming an id
        outside [0, V), LutError after `close`.
        """
        ids, layout = _checked_ids(token_ids, self.layout.vocab_size), self.layout
        if self.row_ids is not None:  # from here on an id is the number of its row, or `num_rows` where it has none
            ids = row_numbers(self.row_ids, ids)
            token_ids = torch.tensor(ids, dtype=torch.int64)
        with self._gate:
            self._stats.requests += 1
            self._stats.rows += len(ids)
            if isinstance(self.reader, ResidentTable):
                wanted_ids = token_ids.to(self.reader.table.device, non_blocking=True)
                return RowRequest(layout, self.reader.gather(wanted_ids, out), None)
            memory = self._buffers.take(len(ids)) if out is None else out.numpy()
            rows = memory[: len(ids)]
            wanted, keep = list(zip(ids, range(len(ids)), strict=True)), None
            if self._zero_row is not None:
                rows[[position for number, position in wanted if number == layout.num_rows]] = self._zero_row
                wanted = [pair for pair in wanted if pair[0] < layout.num_rows]
            if self._cache is not None:
                id_array = np.array(ids, dtype=np.int64)
                missing = self._cache.copy_hits(id_array, rows)
                if self._zero_row is not None:
                    missing = missing[id_array[missing] < layout.num_rows]
                self._stats.cache_hits += len(wanted) - len(missing)
                self._stats.cache_misses += len(missing)
                wanted = [(ids[position], position) for position in missing.tolist()]
                keep = partial(self._cache.insert, id_array, rows, missing) if wanted else None
            self._stats.bytes += len(wanted) * layout.row_bytes
            finish = self.reader.start(wanted, rows, partial(self._arrived, rows))
        codes = self._buffers.lend(memory, rows) if out is None else out  # takes a while, so the reads start before
        done = finish is None and keep is None
        return RowRequest(layout, codes, None if done else partial(self._finish, finish, keep))

    def gather(self, token_ids: Tensor) -> Tensor:
        """Return the rows (U, L, E, D) of `token_ids` (U,) int64."""
        return self.request(token_ids).wait()

    def close(self) -> None:
        """Wait for reads in progress, then close files and stop threads; further requests raise LutError."""
        self._gate.close()
        self.reader.close()
        self._cache = None

    def __enter__(self) -> "LutStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _finish(self, finish: Finish | None, keep: Callable[[], None] | None) -> None:
        with self._gate:
            if finish is not None:
                finish()
            if keep is not None:
                keep()

    def _arrived(self, rows: Bytes, token_id: int, position: int) -> None:
        """Check a row on the thread that read it; a damaged one raises LutFormatError."""
        if self._checksums is not None and row_checksum(token_id, rows[position]) != self._checksums[token_id]:
            ids = np.array([token_id], dtype=np.int64)
            check_rows(ids, rows[position : position + 1], self._checksums[ids], self.layout, str(self.lut_dir))

    def _seeded_cache(self, reader: Reader, cache_mb: float) -> RowCache | None:
        num_slots = int(cache_mb * 2**20) // self.layout.row_bytes
        if not num_slots:
            return None
        counts, num_ids = read_token_counts(self.lut_dir, self.manifest), self.layout.num_rows
        if self.row_ids is not None:
            num_ids += 1  # what stands for ids without a row, and is never here
            counts = None if counts is None else np.append(counts[self.row_ids], 0)
        cache = RowCache(num_slots, num_ids, self.layout.row_bytes, counts)
        if counts is not None:
            frequent = np.argsort(-counts, kind="stable")[: cache.num_slots]
            frequent = frequent[counts[frequent] > 0].astype(np.int64)
            for start in range(0, len(frequent), SEED_ROWS):
                ids = np.sort(frequent[start : start + SEED_ROWS])
                rows, positions = np.empty((len(ids), self.layout.row_bytes), dtype=np.uint8), np.arange(len(ids))
                wanted = list(zip(ids.tolist(), positions.tolist(), strict=True))
                self._finish(reader.start(wanted, rows, partial(self._arrived, rows)), None)
                cache.insert(ids, rows, positions)
        return cache

    def _verify_table(self, table: Tensor, checksums: NDArray[np.uint32]) -> None:
        step = max(1, 2**26 // self.layout.row_bytes)
        for ids in torch.arange(self.layout.num_rows).split(step):
            rows = table[ids[0] : ids[-1] + 1].cpu().numpy()
            check_rows(ids.numpy(), rows, checksums[ids.numpy()], self.layout, str(self.lut_dir))


def _checked_ids(token_ids: Tensor, vocab_size: int) -> list[int]:
    if token_ids.dim() != 1 or token_ids.dtype != torch.int64:
        shape = tuple(token_ids.shape)
        raise ValueError(f"token_ids must be one-dimensional int64, found shape {shape} and {token_ids.dtype}")
    ids: list[int] = token_ids.tolist()
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        bad = next(token_id for token_id in ids if not 0 <= token_id < vocab_size)
        raise IndexError(f"token id {bad} is outside the table's vocabulary [0, {vocab_size})")
    return ids
