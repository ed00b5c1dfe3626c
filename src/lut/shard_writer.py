"""Writes one shard: rows are appended to a `.partial` file, and a journal counts those that are synced to disk.

The journal also keeps the sums of `row_errors.json`, and stays until the table is published. A chunk is written while
the next is computed. Locks keep two builders out of one directory; the kernel releases them when a process ends.

U token ids in a chunk, L layers, E experts, D hidden.
"""

import errno
import fcntl
import json
import os
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from src.errors import LutError
from src.lut.codecs import Codec
from src.lut.layout import CHECKSUM_BYTES, Shard, row_checksums
from src.lut.manifest import LayerSums, add, combine, measure
from src.lut.plan import BuildPlan
from src.system.console import Advance
from src.system.files import sync_directory, write_text


class Background:
    """Runs one job at a time in a thread while the caller prepares the next, and reports what each returns."""

    def __init__(self, report: Advance) -> None:
        """Call `report`, in the caller's thread, with what each job returned."""
        self._report, self._executor = report, ThreadPoolExecutor(1, thread_name_prefix="lut-writer")
        self._job: Future[int] | None = None

    def submit(self, job: Callable[[], int]) -> None:
        """Wait for the previous job, then start this one; raises what the previous one raised."""
        self.wait()
        self._job = self._executor.submit(job)

    def wait(self) -> None:
        """Wait for the running job, if any."""
        if self._job is not None:
            job, self._job = self._job, None
            self._report(job.result())

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, *_: object) -> None:
        """Let the last job finish, also after an error."""
        self._executor.shutdown()


LOCK_NAME = "build.lock"


@contextmanager
def building(lut_dir: Path, *, shared: bool) -> Generator[None]:
    """Lock the directory, alone or shared with other ranks of the same build; LutError if another build holds it."""
    descriptor = lock_file(lut_dir / LOCK_NAME, shared=shared)
    try:
        yield
    finally:
        os.close(descriptor)


def lock_file(path: Path, *, shared: bool = False) -> int:
    """Open (or create) a file, lock it, and return its descriptor; closing it unlocks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if _is_still(path, descriptor):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise LutError(
                f"{path.parent}: another process is building this table; wait for it, or choose another --lut"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the file was renamed or removed between `open` and `flock`; lock its successor


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


_BLOCK_BYTES = 4 * 2**20
"""Rows encoded and compared at a time on a CPU, so that they stay in its cache."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows, ready to be written."""

    first_token: int
    rows: NDArray[np.uint8]
    """(U, row_bytes)."""
    sums: list[LayerSums]


@dataclass(frozen=True)
class Journal:
    """How much of a shard is on disk."""

    num_tokens: int
    sums: list[LayerSums]

    def write(self, path: Path) -> None:
        """Replace the journal at `path`, whole or not at all."""
        write_text(path, json.dumps({"num_tokens": self.num_tokens, "sums": self.sums}))

    @classmethod
    def read(cls, path: Path, num_layers: int) -> "Journal":
        """Read the journal at `path`; a missing or damaged one counts as empty."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            journal = cls(int(document["num_tokens"]), [LayerSums(*map(float, sums)) for sums in document["sums"]])
        except (OSError, ValueError, TypeError, KeyError):
            return cls.empty(num_layers)
        return journal if len(journal.sums) == num_layers else cls.empty(num_layers)

    @classmethod
    def empty(cls, num_layers: int) -> "Journal":
        """Return the journal of a shard without rows."""
        return cls(0, [LayerSums(0.0, 0.0, 0.0)] * num_layers)


def journal_path(plan: BuildPlan, shard: Shard) -> Path:
    """Path of a shard's journal."""
    return (plan.lut_dir / shard.file_name).with_suffix(".progress")


def is_finished(plan: BuildPlan, shard: Shard) -> bool:
    """Whether the whole shard is on disk."""
    journal = Journal.read(journal_path(plan, shard), plan.layout.num_layers)
    return (plan.lut_dir / shard.file_name).exists() and journal.num_tokens == shard.num_tokens


class ShardFile:
    """An unfinished shard, locked; `written` rows of it are on disk."""

    def __init__(self, plan: BuildPlan, shard: Shard) -> None:
        """Open the shard and find out where an earlier writer stopped; LutError if another process is writing it."""
        self._plan, self._shard = plan, shard
        self._final = plan.lut_dir / shard.file_name
        self._partial, self._journal_path = self._final.with_suffix(".partial"), journal_path(plan, shard)
        with disk_errors(self._partial):
            self._descriptor = lock_file(self._partial)
            self._open = True
            try:
                self._journal = self._resume()
                _write_all(self._descriptor, memoryview(shard.header(plan.layout)), 0)
            except BaseException:
                self.close()
                raise

    @property
    def written(self) -> int:
        """Rows that are on disk."""
        return self._journal.num_tokens

    def store(self, chunk: Chunk) -> int:
        """Write the next rows, then the journal that counts them; return how many."""
        layout, shard, offset = self._plan.layout, self._shard, self.written
        checksums = row_checksums(chunk.first_token, chunk.rows).astype("<u4").tobytes()
        with disk_errors(self._partial):
            rows_at = shard.rows_offset(layout) + offset * layout.row_bytes
            _write_all(self._descriptor, chunk.rows.data.cast("B"), rows_at)
            _write_all(
                self._descriptor, memoryview(checksums), shard.checksums_offset(layout) + offset * CHECKSUM_BYTES
            )
            os.fsync(self._descriptor)  # before the journal counts it
            sums = [add(total, more) for total, more in zip(self._journal.sums, chunk.sums, strict=True)]
            self._journal = Journal(offset + len(chunk.rows), sums)
            self._journal.write(self._journal_path)
            if self.written == shard.num_tokens:
                self.finish()
        return len(chunk.rows)

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

    def _resume(self) -> Journal:
        """Return the journal if the file can hold what it counts; otherwise start over."""
        journal = Journal.read(self._journal_path, self._plan.layout.num_layers)
        if self._holds(journal.num_tokens):
            return journal
        os.ftruncate(self._descriptor, 0)
        return Journal.empty(self._plan.layout.num_layers)

    def _holds(self, num_tokens: int) -> bool:
        """Whether the file can hold what the journal counts: the last of its checksums is within the file."""
        shard, layout = self._shard, self._plan.layout
        needed = shard.checksums_offset(layout) + num_tokens * CHECKSUM_BYTES if num_tokens else 0
        return 0 <= num_tokens <= shard.num_tokens and os.fstat(self._descriptor).st_size >= needed


def encode_chunk(plan: BuildPlan, first_token: int, num_tokens: int) -> Chunk:
    """Compute and encode the rows of consecutive ids; LutError names the layer that cannot be stored."""
    layout = plan.layout
    encoded: Tensor | None = None
    measured: list[Tensor] = []
    for layer in range(layout.num_layers):
        rows = plan.source.layer_rows(layer, first_token, num_tokens)  # (U, E, D)
        if encoded is None:
            shape = (num_tokens, layout.num_layers, layout.num_experts, layout.vector_bytes)
            encoded = torch.empty(shape, dtype=torch.uint8, device=rows.device)
        try:
            measured.append(encode_layer(layout.codec, rows, encoded[:, layer]))
        except LutError as error:
            raise LutError(f"layer {layer}, ids from {first_token}: {error}") from error
    assert encoded is not None
    sums = [LayerSums(*layer) for layer in torch.stack(measured).tolist()]  # the only wait for a device
    _require_finite(plan, sums, first_token)
    return Chunk(first_token, encoded.view(num_tokens, layout.row_bytes).cpu().numpy(), sums)


def encode_layer(used: Codec, rows: Tensor, target: Tensor) -> Tensor:
    """Encode rows (U, E, D) into target (U, E, vector_bytes), read them back, and return what `measure` sums."""
    on_cpu = rows.device.type == "cpu"
    block_tokens = max(1, _BLOCK_BYTES // rows[0].nbytes) if on_cpu else len(rows)
    measured: list[Tensor] = []
    for block, codes in zip(rows.split(block_tokens), target.split(block_tokens), strict=True):
        codes.copy_(used.encode(block))
        measured.append(measure(block, used.decode(codes, rows.shape[-1])))
    return combine(measured)


def _require_finite(plan: BuildPlan, sums: list[LayerSums], first_token: int) -> None:
    for layer, layer_sums in enumerate(sums):
        if not all(np.isfinite(layer_sums)):
            raise LutError(
                f"layer {layer}, ids from {first_token}: a row holds NaN, infinity, or more than "
                f"{plan.layout.precision} can; check the weights, or choose another --dtype"
            )


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:  # a signal or a nearly full disk makes pwrite stop short
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


@contextmanager
def disk_errors(path: Path) -> Generator[None]:
    """Turn a failed write into a LutError that names `path` and what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free some space and resume: what is written stays" if full else "make it writable and resume"
        raise LutError(f"{path}: could not be written ({error.strerror}); {remedy}") from error
