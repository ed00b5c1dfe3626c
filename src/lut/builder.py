"""Builds a table: plan, prepare, write shards (by as many ranks as there are), publish.

Nothing is readable before `publish` writes the manifest. An interrupted build continues at the chunk where it stopped
and ends with the same bytes. Memory holds two chunks, never a table: one is written while the next is computed.
`estimate` predicts size, memory and time from a small trial, without writing anything.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from src.errors import LutError, LutWriteError
from src.lut.layout import SHARD_BYTES, Shard
from src.lut.manifest import COUNTS_NAME, MANIFEST_NAME, OLD_ERRORS_NAME, ROW_IDS_NAME, Manifest
from src.lut.plan import MEMORY_BYTES, PLAN_NAME, BuildPlan, plan
from src.lut.shard_writer import (
    LOCK_NAME,
    ShardFile,
    building,
    disk_errors,
    encode_chunk,
    encode_layer,
    is_finished,
    journal_path,
)
from src.lut.sources import RowSource, open_source
from src.model import Transformer
from src.run_directory import RunDirectory
from src.system.console import Advance, Progress, no_progress
from src.system.files import atomic_path, free_bytes, sync_directory, write_text
from src.system.hardware import require_posix

T = TypeVar("T")


def is_built(plan: BuildPlan) -> bool:
    """Whether the directory holds the finished table of this plan."""
    path = plan.lut_dir / MANIFEST_NAME
    return path.is_file() and path.read_bytes() == plan.manifest.text.encode()


def clear(plan: BuildPlan, *, resume: bool, overwrite: bool) -> None:
    """Remove what an earlier build left, if that is allowed."""
    (plan.lut_dir / MANIFEST_NAME).unlink(missing_ok=True)  # first, so that no half-replaced table is ever readable
    sync_directory(plan.lut_dir)
    leftovers = sorted((*plan.lut_dir.glob("rows-*"), *plan.lut_dir.glob(".*.tmp")))
    if leftovers and resume and not overwrite:
        raise LutError(
            f"{plan.lut_dir}: holds an unfinished table of other weights or another precision; "
            "remove the directory, or --overwrite it"
        )
    for leftover in leftovers:
        leftover.unlink()


def tidy(plan: BuildPlan) -> None:
    """Remove what only a build needs, and what a killed one left; the plan last, since it marks this as unfinished."""
    for shard in plan.shards:
        journal_path(plan, shard).unlink(missing_ok=True)
    for stray in (*plan.lut_dir.glob(".*.tmp"), *plan.lut_dir.glob("rows-*.partial")):
        stray.unlink(missing_ok=True)
    for name in (OLD_ERRORS_NAME, PLAN_NAME, LOCK_NAME):
        (plan.lut_dir / name).unlink(missing_ok=True)


def require_space(plan: BuildPlan) -> None:
    """Raise LutWriteError when what is still to be written does not fit the disk."""
    present = sum(path.stat().st_blocks * 512 for path in plan.lut_dir.glob("rows-*"))
    free = shutil.disk_usage(plan.lut_dir).free
    if plan.file_bytes - present > free:
        raise LutWriteError(
            f"{plan.lut_dir}: the table needs {plan.file_bytes - present:,} more bytes, but {free:,} are free; "
            "free some space or choose a smaller --dtype"
        )


def no_barrier() -> None:
    """Return at once: a single rank has no other to wait for."""


def own_value(value: T) -> T:
    """Return `value`: each rank believes what it sees."""
    return value


def prepare(plan: BuildPlan, *, resume: bool = True, overwrite: bool = False) -> None:
    """Make the directory ready for writers: check for another table, for free space, and record the plan.

    LutError when the directory holds something else, another process builds in it, or the disk is too small.
    """
    require_posix("building a table")
    finished = (plan.lut_dir / MANIFEST_NAME).exists()
    if finished and resume and plan.is_recorded() and is_built(plan):
        return  # interrupted after the manifest was written; `publish` removes what is left over
    if finished and not overwrite:
        raise LutError(f"{plan.lut_dir}: holds a finished table; choose another --lut name, or --overwrite it")
    continues = resume and not finished and plan.is_recorded()
    with disk_errors(plan.lut_dir):
        plan.lut_dir.mkdir(parents=True, exist_ok=True)
    with disk_errors(plan.lut_dir), building(plan.lut_dir, shared=False):
        require_space(plan)  # before anything is removed; files that will be replaced already count as free
        if not continues:
            clear(plan, resume=resume, overwrite=overwrite)
        _write_companions(plan)  # now, so that any later command that finishes this build finds them
        write_text(plan.lut_dir / PLAN_NAME, plan.text)


def write_shards(
    plan: BuildPlan,
    rank: int = 0,
    world_size: int = 1,
    progress: Progress = no_progress,
    *,
    is_prepared: bool = False,
) -> None:
    """Write every `world_size`-th shard, starting with shard `rank`; finished shards and chunks are kept.

    With `is_prepared` another rank has found the directory prepared and the table unfinished. LutError when the disk is
    full (what is written stays), or when another process builds here.
    """
    shards = plan.shards[rank::world_size]
    with building(plan.lut_dir, shared=world_size > 1):
        if not is_prepared and is_built(plan):
            return
        if not is_prepared and not plan.is_recorded():
            raise LutError(
                f"{plan.lut_dir}: is not prepared for this build; prepare it, and build in one place at a time"
            )
        bar = progress("building the table (rows)", sum(shard.num_tokens for shard in shards))
        with bar as advance, ExitStack() as opened, ThreadPoolExecutor(1, "lut-writer") as disk:
            writing: Future[int] | None = None
            for file, rows in _chunks(plan, shards, opened, advance):  # computed while the one before is written
                if writing is not None:
                    advance(writing.result())
                writing = disk.submit(file.store, rows)
            if writing is not None:
                advance(writing.result())


def _chunks(
    plan: BuildPlan, shards: Sequence[Shard], opened: ExitStack, advance: Advance
) -> Iterator[tuple[ShardFile, NDArray[np.uint8]]]:
    """Compute the chunks that are not written yet; `advance` counts the rows that are."""
    for shard in shards:
        if is_finished(plan, shard):
            advance(shard.num_tokens)
            continue
        file = ShardFile(plan, shard)
        opened.callback(file.close)
        advance(file.written)
        if file.written == shard.num_tokens:
            file.finish()
        for offset in range(file.written, shard.num_tokens, plan.chunk_tokens):
            count = min(plan.chunk_tokens, shard.num_tokens - offset)
            yield file, encode_chunk(plan, shard.first_token + offset, count)


def publish(plan: BuildPlan) -> Manifest:
    """Write the manifest, so that the table can be opened, and remove what only its build needed."""
    with disk_errors(plan.lut_dir), building(plan.lut_dir, shared=False):
        if not is_built(plan):
            missing = [shard.file_name for shard in plan.shards if not is_finished(plan, shard)]
            if missing:
                raise LutError(
                    f"{plan.lut_dir}: {missing[0]} is not written yet ({len(missing)} missing); resume the build"
                )
            _write_companions(plan)
            write_text(plan.lut_dir / MANIFEST_NAME, plan.manifest.text)
        tidy(plan)
    return plan.manifest


def build_lut(
    source: RowSource | Transformer | RunDirectory | Path | str,
    lut_dir: Path | str,
    *,
    dtype: str = "bfloat16",
    compute_dtype: str = "float32",
    chunk_tokens: int | None = None,
    memory_bytes: int = MEMORY_BYTES,
    shard_bytes: int = SHARD_BYTES,
    resume: bool = True,
    overwrite: bool = False,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], object] = no_barrier,
    broadcast: Callable[[Any], Any] = own_value,
    tokenizer: str | None = None,
    token_counts: Tensor | None = None,
    progress: Progress = no_progress,
) -> Manifest:
    """Build the lookup table of a model or a run directory, or another precision of a table; return its manifest.

    With `world_size` above 1 every rank calls it with the same arguments but its own `rank`, and writes its share of
    the shards; all call `barrier`, such as `torch.distributed.barrier`, three times. With a `broadcast` that returns
    rank 0's value, rank 0 alone looks for earlier work: on a network disk other machines may see it a minute late.

    `source` and `compute_dtype` are those of `open_source`, `dtype` is a precision of `src.lut.codecs`. `chunk_tokens`
    rows are computed at a time, by default as many as `memory_bytes` of buffers hold; a shard's rows fit `shard_bytes`.
    `resume` keeps a finished table of the same build and continues an unfinished one, in its chunks; `overwrite`
    replaces a finished table, or an unfinished one of another build. `tokenizer` is the fingerprint of the tokenizer
    whose ids these are, `token_counts` (V,) int64 how often training saw each; by default those of a source table.

    Raises LutError if there is no lookup form, the directory holds another table, or the disk is full.
    """
    if world_size > 1 and barrier is no_barrier:
        raise ValueError(f"world_size is {world_size}, but barrier is missing; pass torch.distributed.barrier")
    looks = rank == 0 or broadcast is own_value
    build = plan(
        open_source(source, compute_dtype),
        Path(lut_dir),
        dtype=dtype,
        chunk_tokens=chunk_tokens,
        memory_bytes=memory_bytes,
        shard_bytes=shard_bytes,
        resume=resume and looks,
        tokenizer=tokenizer,
        token_counts=token_counts,
    )
    if broadcast(looks and resume and is_built(build) and not build.is_recorded()):
        return build.manifest
    build = replace(build, chunk_tokens=broadcast(build.chunk_tokens))
    if rank == 0:
        prepare(build, resume=resume, overwrite=overwrite)
    barrier()
    if broadcast(looks and not is_built(build)):
        write_shards(build, rank, world_size, progress, is_prepared=not looks)
    barrier()
    if rank == 0:
        publish(build)
    barrier()
    return build.manifest


def _write_companions(plan: BuildPlan) -> None:
    for name in (COUNTS_NAME, ROW_IDS_NAME):
        if (content := plan.companion(name)) is not None:
            with atomic_path(plan.lut_dir / name) as temporary:
                temporary.write_bytes(content)
        else:
            (plan.lut_dir / name).unlink(missing_ok=True)


_TRIAL_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What `estimate` found."""

    table_bytes: int
    """Size of all shards."""
    num_shards: int
    free_bytes: int
    """Free space on the table's disk."""
    memory_bytes: int
    """Buffers of one rank; weights that its source reads come on top."""
    seconds: float
    """Time to compute and encode every row with one rank; a disk that is slower than that takes longer."""

    @property
    def fits(self) -> bool:
        return self.table_bytes <= self.free_bytes


def estimate(plan: BuildPlan) -> Estimate:
    """Compute and encode one layer of a few rows, and scale up; leaves no trace on disk."""
    layout = plan.layout
    num_tokens = min(_TRIAL_TOKENS, layout.num_rows)
    _trial(plan, num_tokens)  # the first run also reads weights and starts threads
    seconds = _trial(plan, num_tokens)
    return Estimate(
        table_bytes=plan.file_bytes,
        num_shards=len(plan.shards),
        free_bytes=free_bytes(plan.lut_dir),
        memory_bytes=plan.buffer_bytes,
        seconds=seconds * layout.num_layers * layout.num_rows / num_tokens,
    )


def _trial(plan: BuildPlan, num_tokens: int) -> float:
    layout = plan.layout
    start = time.perf_counter()
    rows = plan.source.layer_rows(0, 0, num_tokens)  # (U, E, D)
    codes = torch.empty(num_tokens, layout.num_experts, layout.vector_bytes, dtype=torch.uint8, device=rows.device)
    encode_layer(layout.codec, rows, codes).tolist()  # `tolist` waits for a device
    return time.perf_counter() - start
