"""Builds a table: plan, write shards (by as many ranks as there are), publish.

Nothing is readable before `publish` writes the manifest. Shards grow under a `.partial` name, chunk by chunk; a
journal beside each says how many chunks are safely on disk, so an interrupted build goes on where it stopped and
ends with the same bytes. Memory holds one chunk, never a table.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from src.errors import LutError
from src.files import atomic_path, sync_directory, write_text
from src.lut.integrity import row_checksums, sha256
from src.lut.layout import CHECKSUM_BYTES, Shard, TableLayout, plan_shards
from src.lut.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest, read_manifest, shard_record
from src.lut.quantization import codec
from src.lut.sources import RowSource, open_source
from src.model import Transformer
from src.run_directory import RunDirectory

CHUNK_BYTES = 128 * 2**20
PLAN_NAME = "plan.json"
COUNTS_NAME = "token_counts.safetensors"
Progress = Callable[[int], None]
"""Called with the number of rows that were just written."""


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """Everything the writers must agree on."""

    source: RowSource
    lut_dir: Path
    layout: TableLayout
    shards: tuple[Shard, ...]
    chunk_tokens: int
    tokenizer: str | None
    token_counts: Tensor | None

    @property
    def manifest(self) -> Manifest:
        """The manifest that `publish` will write; it follows from the plan alone."""
        return Manifest(
            format_version=FORMAT_VERSION,
            **asdict(self.layout),
            row_bytes=self.layout.row_bytes,
            shards=tuple(shard_record(shard, self.layout) for shard in self.shards),
            training_form=self.source.identity.training_form,
            backbone=self.source.identity.backbone,
            tokenizer=self.tokenizer,
            token_counts_sha256=None if self.token_counts is None else sha256(_counts_file(self.token_counts)),
        )


def plan(
    source: RowSource,
    lut_dir: Path,
    *,
    dtype: str = "bfloat16",
    chunk_tokens: int | None = None,
    tokenizer: str | None = None,
    token_counts: Tensor | None = None,
) -> BuildPlan:
    """Decide layout, shards and chunks; touches nothing on disk.

    Args:
        source: computes the rows.
        lut_dir: the table's directory.
        dtype: a precision of `src.lut.quantization`.
        chunk_tokens: rows computed and written at a time; by default about `CHUNK_BYTES` of float32 rows.
        tokenizer: fingerprint of the tokenizer whose ids these are.
        token_counts: (V,) int64, how often training saw each id.
    """
    codec(dtype)
    config = source.config
    layout = TableLayout(
        vocab_size=config.vocab_size,
        num_layers=config.num_layers,
        num_experts=config.num_experts,
        hidden_size=config.hidden_size,
        precision=dtype,
    )
    float_row_bytes = 4 * config.num_layers * config.num_experts * config.hidden_size
    return BuildPlan(
        source=source,
        lut_dir=lut_dir,
        layout=layout,
        shards=tuple(plan_shards(layout)),
        chunk_tokens=chunk_tokens or max(1, CHUNK_BYTES // float_row_bytes),
        tokenizer=tokenizer,
        token_counts=token_counts,
    )


def prepare(plan: BuildPlan, *, resume: bool = True, overwrite: bool = False) -> None:
    """Make the directory ready for writers: check for another table, for free space, and record the plan."""
    plan.lut_dir.mkdir(parents=True, exist_ok=True)
    manifest_path, plan_path = plan.lut_dir / MANIFEST_NAME, plan.lut_dir / PLAN_NAME
    recorded = json.dumps({"manifest": asdict(plan.manifest), "chunk_tokens": plan.chunk_tokens}, sort_keys=True)
    if manifest_path.exists():
        if not overwrite:
            raise LutError(f"{plan.lut_dir}: holds a finished table; choose another --lut name, or --overwrite it")
        manifest_path.unlink()  # first, so that no half-replaced table is ever readable
        sync_directory(plan.lut_dir)
    same_plan = plan_path.is_file() and plan_path.read_text(encoding="utf-8") == recorded
    leftovers = sorted(plan.lut_dir.glob("rows-*"))
    if leftovers and not (resume and same_plan):
        if resume and not overwrite:
            raise LutError(
                f"{plan.lut_dir}: holds an unfinished table of other weights or another precision; "
                "remove the directory, or --overwrite it"
            )
        for leftover in leftovers:
            with _locked(leftover):
                leftover.unlink()
    _require_space(plan)
    write_text(plan_path, recorded)


def write_shards(plan: BuildPlan, rank: int = 0, world_size: int = 1, progress: Progress | None = None) -> None:
    """Write every `world_size`-th shard, starting with shard `rank`; finished shards and chunks are kept."""
    report = progress or _silent
    for shard in plan.shards[rank::world_size]:
        if (plan.lut_dir / shard.file_name).exists():
            report(shard.num_tokens)
        else:
            _write_shard(plan, shard, report)


def publish(plan: BuildPlan) -> Manifest:
    """Write token counts and, last, the manifest; from here on the table can be opened."""
    missing = [shard.file_name for shard in plan.shards if not (plan.lut_dir / shard.file_name).exists()]
    if missing:
        raise LutError(f"{plan.lut_dir}: {missing[0]} is not written yet ({len(missing)} missing); resume the build")
    if plan.token_counts is not None:
        with atomic_path(plan.lut_dir / COUNTS_NAME) as temporary:
            temporary.write_bytes(_counts_file(plan.token_counts))
    plan.manifest.write(plan.lut_dir)
    (plan.lut_dir / PLAN_NAME).unlink(missing_ok=True)
    return plan.manifest


def build_lut(
    source: Transformer | RunDirectory | Path | str,
    lut_dir: Path | str,
    *,
    dtype: str = "bfloat16",
    chunk_tokens: int | None = None,
    resume: bool = True,
    overwrite: bool = False,
    rank: int = 0,
    world_size: int = 1,
    tokenizer: str | None = None,
    token_counts: Tensor | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Build the lookup table of a model or run directory and return its manifest.

    With `world_size` above 1 every rank calls it: each writes its shards, and the one that finds all of them
    finished publishes. `src.lut.builder` has the steps apart, for callers that own a barrier. Arguments as in `plan`
    and `prepare`; raises LutError when the model has no lookup form or the directory holds another table.
    """
    build = plan(
        open_source(source),
        Path(lut_dir),
        dtype=dtype,
        chunk_tokens=chunk_tokens,
        tokenizer=tokenizer,
        token_counts=token_counts,
    )
    if (
        resume
        and not overwrite
        and (build.lut_dir / MANIFEST_NAME).exists()
        and read_manifest(build.lut_dir) == build.manifest
    ):
        return build.manifest
    if rank == 0:
        prepare(build, resume=resume, overwrite=overwrite)
    build.lut_dir.mkdir(parents=True, exist_ok=True)
    write_shards(build, rank, world_size, progress)
    if all((build.lut_dir / shard.file_name).exists() for shard in build.shards):
        return publish(build)
    return build.manifest


def _silent(_: int) -> None:
    """Report progress to nobody."""


def _write_shard(plan: BuildPlan, shard: Shard, report: Progress) -> None:
    final = plan.lut_dir / shard.file_name
    partial, journal = final.with_suffix(".partial"), final.with_suffix(".progress")
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with _lock(descriptor, partial):
            written = min(int(journal.read_text()), shard.num_tokens) if journal.is_file() else 0
            report(written)
            os.pwrite(descriptor, shard.header(plan.layout), 0)
            while written < shard.num_tokens:
                count = min(plan.chunk_tokens, shard.num_tokens - written)
                _write_chunk(plan, shard, descriptor, written, count)
                os.fdatasync(descriptor)  # before the journal counts it
                written += count
                write_text(journal, str(written))
                report(count)
            os.ftruncate(descriptor, shard.file_bytes(plan.layout))
            os.fsync(descriptor)
            partial.replace(final)
            journal.unlink(missing_ok=True)
            sync_directory(plan.lut_dir)
    except OSError as error:
        raise LutError(
            f"{partial}: could not be written ({error.strerror}); free some space and resume: what is written stays"
        ) from error
    finally:
        os.close(descriptor)


def _write_chunk(plan: BuildPlan, shard: Shard, descriptor: int, offset: int, count: int) -> None:
    """Compute, encode and write `count` rows starting at row `offset` of the shard."""
    layout, first_token = plan.layout, shard.first_token + offset
    encoded = np.empty((count, layout.num_layers, layout.layer_bytes), dtype=np.uint8)
    for layer in range(layout.num_layers):
        rows = plan.source.layer_rows(layer, first_token, count)  # (count, E, D)
        encoded[:, layer] = codec(layout.precision).encode(rows).flatten(1).cpu().numpy()
    rows_bytes = encoded.reshape(count, layout.row_bytes)
    _pwrite_all(descriptor, rows_bytes.data.cast("B"), shard.rows_offset(layout) + offset * layout.row_bytes)
    checksums = row_checksums(first_token, rows_bytes).astype("<u4").tobytes()
    _pwrite_all(descriptor, memoryview(checksums), shard.checksums_offset(layout) + offset * CHECKSUM_BYTES)


def _pwrite_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:  # a signal or a nearly full disk makes pwrite stop short
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


@contextmanager
def _lock(descriptor: int, path: Path) -> Generator[None]:
    """Hold the file alone; the kernel lets go when the process ends, however it ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LutError(
            f"{path.parent}: another process is building this table; wait for it, or choose another --lut"
        ) from None
    yield


@contextmanager
def _locked(path: Path) -> Generator[None]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with _lock(descriptor, path):
            yield
    finally:
        os.close(descriptor)


def _require_space(plan: BuildPlan) -> None:
    needed = sum(shard.file_bytes(plan.layout) for shard in plan.shards)
    present = sum(path.stat().st_blocks * 512 for path in plan.lut_dir.glob("rows-*"))
    free = shutil.disk_usage(plan.lut_dir).free
    if needed - present > free:
        raise LutError(
            f"{plan.lut_dir}: the table needs {needed - present:,} more bytes, but {free:,} are free; "
            "free some space or choose a smaller --dtype"
        )


def _counts_file(token_counts: Tensor) -> bytes:
    return save({"token_counts": token_counts.to(torch.int64).contiguous()})
