"""Writes one shard: rows are appended to a `.partial` file, and a journal counts those that are synced to disk.

The journal stays until the table is published. Locks keep two builders out of one directory; the kernel releases them
when a process ends.

U token ids in a chunk, L layers, E experts, D hidden.
"""

import errno
import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from src.errors import DISK_FULL, LutError, LutWriteError
from src.lut.codecs import Codec
from src.lut.layout import CHECKSUM_BYTES, Shard, row_checksums
from src.lut.plan import BuildPlan
from src.system.files import sync_directory, write_text
from src.system.locks import open_locked

LOCK_NAME = "build.lock"


@contextmanager
def building(lut_dir: Path, *, shared: bool) -> Generator[None]:
    """Lock the directory, alone or shared with other ranks of the same build; LutError if another build holds it."""
    with disk_errors(lut_dir / LOCK_NAME):
        descriptor = _lock_file(lut_dir / LOCK_NAME, shared=shared)
    try:
        yield
    finally:
        os.close(descriptor)


def _lock_file(path: Path, *, shared: bool = False) -> int:
    try:
        return open_locked(path, shared=shared)
    except BlockingIOError:
        raise LutError(
            f"{path.parent}: another process is building this table; wait for it, or choose another --lut"
        ) from None


_BLOCK_BYTES = 4 * 2**20
"""Rows encoded and checked at a time on a CPU, so that they stay in its cache."""


def journal_path(plan: BuildPlan, shard: Shard) -> Path:
    """Path of a shard's journal."""
    return (plan.lut_dir / shard.file_name).with_suffix(".progress")


def read_journal(path: Path) -> int:
    """Return how many rows are on disk; 0 if the journal is missing or damaged."""
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["num_tokens"])
    except (OSError, ValueError, TypeError, KeyError):
        return 0


def is_finished(plan: BuildPlan, shard: Shard) -> bool:
    """Whether the whole shard is on disk."""
    return (plan.lut_dir / shard.file_name).exists() and read_journal(journal_path(plan, shard)) == shard.num_tokens


class ShardFile:
    """An unfinished shard, locked; `written` rows of it are on disk."""

    def __init__(self, plan: BuildPlan, shard: Shard) -> None:
        """Open the shard and find out where an earlier writer stopped; LutError if another process is writing it."""
        self._plan, self._shard = plan, shard
        self._final = plan.lut_dir / shard.file_name
        self._partial, self._journal_path = self._final.with_suffix(".partial"), journal_path(plan, shard)
        with disk_errors(self._partial):
            self._descriptor = _lock_file(self._partial)
            self._open = True
            try:
                self.written = self._resume()
                _write_all(self._descriptor, memoryview(shard.header(plan.layout)), 0)
            except BaseException:
                self.close()
                raise

    def store(self, rows: NDArray[np.uint8]) -> int:
        """Write the next rows (U, row_bytes), then the journal that counts them; return how many."""
        layout, shard, offset = self._plan.layout, self._shard, self.written
        checksums = row_checksums(shard.first_token + offset, rows).astype("<u4")
        rows_at = shard.rows_offset(layout) + offset * layout.row_bytes
        checksums_at = shard.checksums_offset(layout) + offset * CHECKSUM_BYTES
        with disk_errors(self._partial):
            _write_all(self._descriptor, rows.data.cast("B"), rows_at)
            _write_all(self._descriptor, checksums.data.cast("B"), checksums_at)
            os.fsync(self._descriptor)  # before the journal counts it
            self.written = offset + len(rows)
            write_text(self._journal_path, json.dumps({"num_tokens": self.written}))
            if self.written == shard.num_tokens:
                self.finish()
        return len(rows)

    def finish(self) -> None:
        """Give the shard its name; every row is on disk."""
        with disk_errors(self._partial):
            self._partial.replace(self._final)
            sync_directory(self._plan.lut_dir)
        self.close()

    def close(self) -> None:
        """Unlock the shard; harmless when done twice."""
        if self._open:
            self._open = False
            os.close(self._descriptor)

    def _resume(self) -> int:
        """Return the rows that the journal counts if their checksums are within the file; otherwise start over."""
        shard, num_tokens = self._shard, read_journal(self._journal_path)
        needed = shard.checksums_offset(self._plan.layout) + num_tokens * CHECKSUM_BYTES
        if 0 < num_tokens <= shard.num_tokens and os.fstat(self._descriptor).st_size >= needed:
            return num_tokens
        os.ftruncate(self._descriptor, 0)
        return 0


def encode_chunk(plan: BuildPlan, first_token: int, num_tokens: int) -> NDArray[np.uint8]:
    """Return the encoded rows (U, row_bytes) of consecutive ids; LutError names the layer that cannot be stored."""
    layout = plan.layout
    encoded: Tensor | None = None
    finite: list[Tensor] = []
    first_id = first_token if plan.source.row_ids is None else int(plan.source.row_ids[first_token])
    for layer in range(layout.num_layers):
        rows = plan.source.layer_rows(layer, first_token, num_tokens)  # (U, E, D)
        if encoded is None:
            shape = (num_tokens, layout.num_layers, layout.num_experts, layout.vector_bytes)
            encoded = torch.empty(shape, dtype=torch.uint8, device=rows.device)
        try:
            finite.append(encode_layer(layout.codec, rows, encoded[:, layer]))
        except LutError as error:
            raise LutError(f"layer {layer}, ids from {first_id}: {error}") from error
    assert encoded is not None
    if not all(found := torch.stack(finite).tolist()):  # the only wait for a device
        raise LutError(
            f"layer {found.index(False)}, ids from {first_id}: a row holds NaN, infinity, or more than "
            f"{layout.precision} can; check the weights, or choose another --dtype"
        )
    return encoded.view(num_tokens, layout.row_bytes).cpu().numpy()


def encode_layer(codec: Codec, rows: Tensor, target: Tensor) -> Tensor:
    """Encode rows (U, E, D) into target (U, E, vector_bytes); return whether all stored values are finite, a scalar."""
    on_cpu = rows.device.type == "cpu"
    block_tokens = max(1, _BLOCK_BYTES // rows[0].nbytes) if on_cpu else len(rows)
    finite: list[Tensor] = []
    for block, codes in zip(rows.split(block_tokens), target.split(block_tokens), strict=True):
        codes.copy_(codec.encode(block))
        stored = codec.decode(codes, rows.shape[-1]) if codec.is_view else block
        finite.append(stored.isfinite().all())
    return torch.stack(finite).all()


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:  # a signal or a nearly full disk makes pwrite stop short
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


@contextmanager
def disk_errors(path: Path) -> Generator[None]:
    """Turn a failed write into a LutWriteError that names `path` and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        full = error.errno in DISK_FULL
        remedy = "free some space and resume: what is written stays" if full else "make it writable and resume"
        raise LutWriteError(f"{path}: could not be written ({error.strerror}); {remedy}") from error
