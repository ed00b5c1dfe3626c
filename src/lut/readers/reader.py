"""What a reader is, the readers by name, and what they share: open shards, threads, resets after a fork.

A reader knows files and offsets, not what the bytes of a row mean. In a sparse table, what it takes for token ids are
the numbers of rows. To add one, write a class with the methods of `Reader` and call `register_reader`.

U token ids, V vocabulary.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from src.errors import LutError, LutFormatError
from src.lut.layout import TableLayout, plan_shards, tokens_per_shard
from src.system.files import out_of_files

Bytes = NDArray[np.uint8]
Wanted = Sequence[tuple[int, int]]
"""Pairs of (token id in [0, V), row of the target that it goes to); an id may be wanted twice."""
Arrived = Callable[[int, int], None]
"""Called with (token id, target row) for each complete row, on the thread that completed it; may raise."""
Finish = Callable[[], None]
"""Returns when every row has arrived; raises what reading raised. Called at most once."""


class Reader(Protocol):
    """Reads rows from disk; safe to use from several threads and after a fork."""

    def start(self, wanted: Wanted, rows: Bytes, arrived: Arrived) -> Finish | None:
        """Start to fill `rows` (U, row_bytes) as `wanted` says; return what completes them, or None if they are."""
        ...

    def close(self) -> None:
        """Close files and stop threads; reading afterwards raises LutError. Harmless when done twice."""
        ...


class ResidentTable:
    """The whole table in memory, on a device of choice; rows are selected there and the disk is not read again."""

    def __init__(self, lut_dir: Path, layout: TableLayout, device: torch.device) -> None:
        """Read every shard; costs `layout.table_bytes` of memory. A sparse table ends with the row of other ids."""
        is_sparse = layout.sparse_rows is not None
        table = torch.empty(layout.num_rows + is_sparse, layout.row_bytes, dtype=torch.uint8, device=device)
        if is_sparse:
            table[-1] = zero_row(layout)
        files = ShardFiles(lut_dir, layout)
        try:
            for shard in plan_shards(layout):
                part = table[shard.first_token : shard.first_token + shard.num_tokens]
                staging = part if device.type == "cpu" else torch.empty(part.shape, dtype=torch.uint8)
                files.read_row(shard.first_token, staging.numpy().data.cast("B"))
                if staging is not part:
                    part.copy_(staging)
        finally:
            files.close()
        self.table = table
        """All rows (V, row_bytes) uint8."""

    def gather(self, token_ids: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the stored bytes (U, row_bytes) of `token_ids` (U,), on the table's device unless `out` is given."""
        rows = self.table.index_select(0, token_ids.to(self.table.device))
        return rows if out is None else out.copy_(rows)

    def close(self) -> None:
        self.table = self.table.new_empty(0, self.table.shape[1])


def zero_row(layout: TableLayout) -> Tensor:
    """Return what is stored (row_bytes,) uint8 for vectors of zeros: the row of an id that has none."""
    zeros = layout.codec.encode(torch.zeros(1, 1, layout.hidden_size))  # (1, 1, vector_bytes)
    return zeros.flatten().repeat(layout.num_layers * layout.num_experts)


Open = Callable[[Path, TableLayout, torch.device], Reader | ResidentTable]
"""Opens a table in a directory; the device is where a resident table lives."""


@dataclass(frozen=True)
class ReaderKind:
    """A way to read tables that can be chosen by name."""

    help: str
    """One line for `--help`."""
    open: Open


READERS: dict[str, ReaderKind] = {}
"""All readers by name."""


def register_reader(name: str, help: str, open: Open) -> None:  # noqa: A002 (what they are)
    """Make a reader available under `name` to `LutStore.open`, to `--reader` and to `verify`."""
    if name in READERS:
        raise ValueError(f"a reader named {name!r} is registered already; choose another name")
    READERS[name] = ReaderKind(help, open)


class ShardFiles:
    """Open descriptors of every shard; positioned reads share them between threads and with forked children."""

    def __init__(self, lut_dir: Path, layout: TableLayout, flags: int = 0) -> None:
        """Open the shards for reading, with extra `flags` of `os.open`."""
        self.row_bytes, self.shards = layout.row_bytes, plan_shards(layout)
        self.paths = [lut_dir / shard.file_name for shard in self.shards]
        self._tokens_per_shard = tokens_per_shard(layout)
        self._offsets = [shard.rows_offset(layout) for shard in self.shards]
        self.descriptors: list[int] = []
        self._seeking = threading.Lock()
        try:
            for path in self.paths:
                self.descriptors.append(os.open(path, os.O_RDONLY | flags | getattr(os, "O_BINARY", 0)))
        except OSError as error:
            self.close()
            if (limit := out_of_files(error)) is not None:
                raise LutError(f"{lut_dir}: the table has {len(self.paths)} shards, {limit}") from error
            raise

    def locate(self, token_id: int) -> tuple[int, int]:
        """Return the index of an id's shard and the byte of that file where its row starts."""
        shard, row = divmod(token_id, self._tokens_per_shard)
        return shard, self._offsets[shard] + row * self.row_bytes

    def read(self, token_id: int, target: memoryview, skip: int = 0, flags: int = 0) -> int:
        """Read once, from `skip` bytes behind the start of an id's row; return how many bytes came.

        With RWF_NOWAIT in `flags` that is 0 where the disk is needed. A failing disk raises LutError naming the file.
        """
        shard, row = divmod(token_id, self._tokens_per_shard)
        offset = self._offsets[shard] + row * self.row_bytes + skip
        try:
            if not hasattr(os, "preadv"):  # Windows
                return self._seek_and_read(self.descriptors[shard], target, offset)
            return os.preadv(self.descriptors[shard], [target], offset, flags)
        except BlockingIOError:
            return 0
        except IndexError:
            raise LutError(f"{self.paths[shard].parent}: the table is closed; open it again to read") from None
        except OSError as error:
            raise LutError(
                f"{self.paths[shard]}: reading from byte {offset:,} failed ({error.strerror}); check the disk and copy "
                "or rebuild the table"
            ) from error

    def _seek_and_read(self, descriptor: int, target: memoryview, offset: int) -> int:
        with self._seeking:
            os.lseek(descriptor, offset, os.SEEK_SET)
            found = os.read(descriptor, len(target))
        target[: len(found)] = found
        return len(found)

    def read_row(self, token_id: int, target: memoryview) -> None:
        """Fill `target` from the start of an id's row, repeating reads that the kernel cuts short."""
        done = 0
        while done < len(target):
            count = self.read(token_id, target[done:], done)
            if count == 0:
                raise self.truncated(token_id)
            done += count

    def truncated(self, token_id: int) -> LutFormatError:
        """Return the error for a file that ends before an id's row does."""
        shard, offset = self.locate(token_id)
        size = os.fstat(self.descriptors[shard]).st_size
        return LutFormatError(
            f"{self.paths[shard]}: {size:,} bytes long while the row at byte {offset:,} was read, so it was truncated "
            "after it was opened; copy the table again or rebuild it"
        )

    def close(self) -> None:
        while self.descriptors:
            os.close(self.descriptors.pop())


class Resettable(Protocol):
    """Holds threads or locks."""

    def reset_after_fork(self) -> None: ...


owners: WeakSet[Resettable] = WeakSet()


def reset_after_fork(owner: Resettable) -> None:
    """Call `owner.reset_after_fork()` in every forked child, as long as `owner` lives.

    Threads do not survive a fork, and a lock that another thread held would never be released.
    """
    owners.add(owner)


def _reset_owners() -> None:
    for owner in list(owners):
        owner.reset_after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_reset_owners)  # once, since it cannot be undone

Item = TypeVar("Item")


class WorkerPool:
    """Up to `depth` threads for reads that block, started on first use."""

    def __init__(self, depth: int) -> None:
        self._depth, self._closed = depth, False
        self.reset_after_fork()
        reset_after_fork(self)

    def reset_after_fork(self) -> None:
        self._lock, self._executor = threading.Lock(), None

    def start(self, perform: Callable[[Item], None], items: Sequence[Item]) -> Finish:
        """Perform `items` in parallel; the function returned helps with what is left, then waits."""
        process, left = os.getpid(), iter(items)  # `next` on this iterator is atomic

        def take() -> None:
            for item in left:
                perform(item)

        executor = self._running()
        helpers = [executor.submit(take) for _ in range(min(self._depth, len(items)))]

        def finish() -> None:
            if os.getpid() != process:  # started before a fork: the threads are in the other process
                for item in items:
                    perform(item)
                return
            take()
            for helper in helpers:
                if not helper.cancel():  # running or done
                    helper.result()

        return finish

    def _running(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._closed:
                raise LutError("the table is closed; open it again to read")
            if self._executor is None:
                self._executor = ThreadPoolExecutor(self._depth, thread_name_prefix="lut-read")
            return self._executor

    def close(self) -> None:
        """Stop the threads when they have finished the items they took."""
        with self._lock:
            self._closed = True
            if self._executor is not None:
                self._executor.shutdown(cancel_futures=True)
                self._executor = None
