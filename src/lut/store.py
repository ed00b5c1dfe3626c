"""`LutStore`: a table on disk, opened, checked, and asked for rows by token id.

U token ids, L layers, E experts, D hidden.

Rows that were asked for: wait for them as late as possible, decode them a layer at a time.

U token ids, L layers, E experts, D hidden.

Keeps files open while anybody reads from them.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from src.errors import LutError
from src.lut.cache import RowCache
from src.lut.layout import TableLayout, check_rows, plan_shards, row_checksum
from src.lut.manifest import Manifest, read_manifest
from src.lut.readers import READERS, Fetch, Reader, open_reader
from src.lut.readers.memory import MemoryReader
from src.lut.readers.reader import BufferPool, Bytes, Done, Wanted, after_fork_in_child
from src.lut.scan import check_shard, read_checksums, read_token_counts


@dataclass
class ReadStats:
    """What a store has done since it was opened; a consistent copy, not a live view."""

    requests: int = 0
    rows: int = 0
    """Rows asked for."""
    bytes: int = 0
    """Bytes of rows that the reader fetched: those of the row cache are not among them."""
    cache_hits: int = 0
    cache_misses: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of rows that the row cache held; 0 without one."""
        return self.cache_hits / max(1, self.cache_hits + self.cache_misses)


class RowRequest:
    """Rows on their way. Every method waits; waiting twice costs nothing, and raises again what the read raised."""

    def __init__(self, layout: TableLayout, codes: Tensor, finish: Callable[[], None] | None) -> None:
        """`codes` (U, row_bytes) are complete once `finish` returns; None says that they are."""
        self._layout, self._codes, self._finish = layout, codes, finish
        self._lock = threading.Lock()
        self._error: BaseException | None = None

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
        return decode(self.codes(), self._layout)

    def layer(self, layer: int) -> Tensor:
        """Return one layer's rows (U, E, D), decoding no other: packed rows stay packed until they are used."""
        return layer_decoder(self.codes(), self._layout)(layer)


def decode(codes: Tensor, layout: TableLayout) -> Tensor:
    """Turn stored bytes (U, row_bytes) into rows (U, L, E, D)."""
    return layout.codec.decode(_vectors(codes, layout), layout.hidden_size)


def decodes_to_view(layout: TableLayout) -> bool:
    """Whether decoded rows are the stored bytes themselves, so that a view of them may be made before they arrive."""
    return layout.codec.is_view


def layer_decoder(codes: Tensor, layout: TableLayout) -> Callable[[int], Tensor]:
    """Return what turns one layer of stored bytes (U, row_bytes) into rows (U, E, D); packed ones as it is called."""
    row_codec, vectors = layout.codec, _vectors(codes, layout)
    if decodes_to_view(layout):  # so one serves all layers
        return row_codec.decode(vectors, layout.hidden_size).unbind(1).__getitem__
    return lambda layer: row_codec.decode(vectors[:, layer], layout.hidden_size)


def _vectors(codes: Tensor, layout: TableLayout) -> Tensor:
    return codes.view(-1, layout.num_layers, layout.num_experts, layout.vector_bytes)


class Gate:
    """Counts who is inside; `close` lets nobody else in and waits until all have left."""

    def __init__(self, closed_message: str) -> None:
        """`closed_message` is what entering a closed gate raises as LutError."""
        self._message, self._closed = closed_message, False
        self._reset()
        after_fork_in_child(self._reset)  # threads that were inside do not exist in the child

    def _reset(self) -> None:
        self._inside, self._changed = 0, threading.Condition()

    def __enter__(self) -> None:
        """Go in, or raise LutError when closed."""
        with self._changed:
            if self._closed:
                raise LutError(self._message)
            self._inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Go out."""
        with self._changed:
            self._inside -= 1
            if self._closed:
                self._changed.notify_all()

    def close(self) -> bool:
        """Close and wait; whether this call was the one that closed it."""
        with self._changed:
            first, self._closed = not self._closed, True
            self._changed.wait_for(lambda: not self._inside)
            return first


SEED_ROWS = 256
"""Rows read at a time when the cache is seeded."""


class LutStore:
    """A finished table. Share it between threads and with forked children; close it or use it as a context manager."""

    def __init__(
        self,
        lut_dir: Path,
        manifest: Manifest,
        *,
        reader: str = "auto",
        cache_mb: float = 0,
        verify_rows: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        """Use `LutStore.open`, which checks the directory first."""
        self.lut_dir, self.manifest, self.layout = lut_dir, manifest, manifest.layout
        self._verify_rows, self._stats, self._buffers = verify_rows, ReadStats(), BufferPool()
        self._checksums = read_checksums(lut_dir, manifest) if verify_rows else np.empty(0, dtype=np.uint32)
        self._reader = open_reader(reader, lut_dir, self.layout, plan_shards(self.layout), device)
        self._gate = Gate(f"{lut_dir}: the store is closed; open it again to read")
        self._reset_lock()
        after_fork_in_child(self._reset_lock)
        self._cache = None
        try:
            if not isinstance(self._reader, MemoryReader):
                self._cache = self._seeded_cache(cache_mb)
            elif verify_rows:
                self._verify_table(self._reader.table)
        except BaseException:
            self._reader.close()
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
            reader: one of `src.lut.readers.READERS`; `auto` tries what this disk does best.
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
        for record in manifest.shards:
            check_shard(Path(lut_dir), record)
        return cls(Path(lut_dir), manifest, reader=reader, cache_mb=cache_mb, verify_rows=verify_rows, device=device)

    @property
    def reader(self) -> Reader:
        """How rows are read."""
        return self._reader

    @property
    def stats(self) -> ReadStats:
        """What was read since the table was opened; seeding the cache is not counted."""
        with self._lock:
            return replace(self._stats)

    def request(self, token_ids: Tensor, out: Tensor | None = None) -> RowRequest:
        """Start reading the rows of `token_ids` (U,) int64 and return at once.

        `out` is an optional contiguous (U, row_bytes) uint8 CPU buffer to read into; without it one is reused that
        nobody refers to any more. Raises IndexError naming an id outside [0, V), LutError after `close`.
        """
        return RowRequest(self.layout, *self._read(token_ids, out, background=True))

    def gather(self, token_ids: Tensor) -> Tensor:
        """Return the rows (U, L, E, D) of `token_ids` (U,) int64."""
        codes, finish = self._read(token_ids, None, background=False)
        view = self.decode(codes) if decodes_to_view(self.layout) else None  # made while the disk works
        if finish is not None:
            finish()
        return self.decode(codes) if view is None else view

    def decode(self, codes: Tensor) -> Tensor:
        """Turn (U, row_bytes) stored bytes into (U, L, E, D) rows."""
        return decode(codes, self.layout)

    def close(self) -> None:
        """Wait for reads in hand, then let go of files and threads; further requests raise LutError."""
        if self._gate.close():
            self._reader.close()
            self._cache = None

    def __enter__(self) -> "LutStore":
        """Return the store itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the store."""
        self.close()

    def _reset_lock(self) -> None:
        self._lock = threading.Lock()

    def _read(
        self, token_ids: Tensor, out: Tensor | None, *, background: bool
    ) -> tuple[Tensor, Callable[[], None] | None]:
        """Return stored bytes (U, row_bytes), and what completes them where they are not yet."""
        ids = _checked_ids(token_ids, self.layout.vocab_size)
        with self._gate:
            if isinstance(self._reader, MemoryReader):
                self._count(len(ids), read=0)
                return _select(self._reader.table, token_ids, out), None
            cache = self._cache
            if cache is None and len(ids) == 1:
                self._reader.announce(ids[0])
            rows = self._buffers.take(len(ids), self.layout.row_bytes) if out is None else out.numpy()
            codes = torch.from_numpy(rows) if out is None else out
            if cache is None:
                self._count(len(ids), read=len(ids))
                fetch = self._start(list(zip(ids, range(len(ids)), strict=True)), rows, background=background)
                return codes, None if isinstance(fetch, Done) else partial(self._finish, fetch)
            wanted = np.array(ids, dtype=np.int64)
            missing = cache.copy_hits(wanted, rows)
            self._count(len(ids), read=len(missing))
            pairs = list(zip(wanted[missing].tolist(), missing.tolist(), strict=True))
            fetch = self._start(pairs, rows, background=background)
            return codes, partial(self._finish, fetch, partial(cache.insert, wanted, rows, missing)) if pairs else None

    def _start(self, wanted: Wanted, rows: Bytes, *, background: bool) -> Fetch:
        return self._reader.start(wanted, rows, partial(self._arrived, rows), background=background)

    def _finish(self, fetch: Fetch, keep: Callable[[], None] | None = None) -> None:
        with self._gate:
            fetch.finish()
            if keep is not None:
                keep()

    def _arrived(self, rows: Bytes, token_id: int, position: int) -> None:
        """Check a row as soon as it is there, on the thread that brought it; a damaged one raises LutFormatError."""
        if self._verify_rows and row_checksum(token_id, rows[position]) != self._checksums[token_id]:
            ids = np.array([token_id], dtype=np.int64)
            check_rows(ids, rows[position : position + 1], self._checksums[ids], str(self.lut_dir))

    def _count(self, rows: int, *, read: int) -> None:
        with self._lock:
            stats = self._stats
            stats.requests += 1
            stats.rows += rows
            stats.bytes += read * self.layout.row_bytes
            if self._cache is not None:
                stats.cache_hits += rows - read
                stats.cache_misses += read

    def _seeded_cache(self, cache_mb: float) -> RowCache | None:
        num_slots = int(cache_mb * 2**20) // self.layout.row_bytes
        if not num_slots:
            return None
        counts = read_token_counts(self.lut_dir, self.manifest)
        cache = RowCache(num_slots, self.layout.vocab_size, self.layout.row_bytes, counts)
        if counts is not None:
            frequent = np.argsort(-counts, kind="stable")[: cache.num_slots]
            frequent = frequent[counts[frequent] > 0].astype(np.int64)
            for start in range(0, len(frequent), SEED_ROWS):
                ids = np.sort(frequent[start : start + SEED_ROWS])
                rows = self._buffers.take(len(ids), self.layout.row_bytes)
                positions = np.arange(len(ids))
                pairs = list(zip(ids.tolist(), positions.tolist(), strict=True))
                self._start(pairs, rows, background=False).finish()
                cache.insert(ids, rows, positions)
        return cache

    def _verify_table(self, table: Tensor) -> None:
        step = max(1, 2**26 // self.layout.row_bytes)
        for part, ids in zip(table.split(step), torch.arange(len(table)).split(step), strict=True):
            rows = part.cpu().numpy()
            check_rows(ids.numpy(), rows, self._checksums[ids.numpy()], str(self.lut_dir))


def _checked_ids(token_ids: Tensor, vocab_size: int) -> list[int]:
    if token_ids.dim() != 1 or token_ids.dtype != torch.int64:
        shape = tuple(token_ids.shape)
        raise ValueError(f"token_ids must be one-dimensional int64, found shape {shape} and {token_ids.dtype}")
    ids: list[int] = token_ids.tolist()
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        bad = next(token_id for token_id in ids if not 0 <= token_id < vocab_size)
        raise IndexError(f"token id {bad} is outside the table's vocabulary [0, {vocab_size})")
    return ids


def _select(table: Tensor, token_ids: Tensor, out: Tensor | None) -> Tensor:
    """Copy rows (U, row_bytes) out of a table in memory, on its device."""
    ids = token_ids.to(table.device)
    return table.index_select(0, ids) if out is None else torch.index_select(table, 0, ids, out=out)
