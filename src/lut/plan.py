"""What a build will do, decided before it touches the disk: everything that its writers must agree on."""

import json
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save
from torch import Tensor

from src.errors import LutError
from src.lut.layout import SHARD_BYTES, Shard, TableLayout, plan_shards, sha256, tokens_per_shard
from src.lut.manifest import COUNTS_NAME, ROW_IDS_NAME, Manifest, format_version, read_manifest
from src.lut.sources import RowSource, TableRows

T = TypeVar("T")
PLAN_NAME = "plan.json"
MEMORY_BYTES = 512 * 2**20
"""What a builder's buffers take by default; weights that its source reads come on top."""
_FLOAT_BYTES = 4
_LAYER_COPIES = 3
"""Rows of one layer as they are computed, encoded and checked."""


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """What a build will do."""

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
            layout=self.layout,
            rows_from=self.source.rows_from,
            training_form=self.source.identity.training_form,
            backbone=self.source.identity.backbone,
            tokenizer=self.tokenizer,
            token_counts_sha256=_digest(self.companion(COUNTS_NAME)),
            row_ids_sha256=_digest(self.companion(ROW_IDS_NAME)),
        )

    @property
    def text(self) -> str:
        """The plan as JSON: two builds of the same text write the same rows, and one can finish the other's."""
        row_ids = _digest(self.companion(ROW_IDS_NAME))
        document = {
            "format_version": format_version(self.layout),
            **self.layout.to_dict(),
            "chunk_tokens": self.chunk_tokens,
            "rows_from": self.source.rows_from,
            "training_form": self.source.identity.training_form,
            "backbone": self.source.identity.backbone,
            **({} if row_ids is None else {"row_ids_sha256": row_ids}),
        }
        return json.dumps(document, indent=1) + "\n"

    @property
    def file_bytes(self) -> int:
        return sum(shard.file_bytes(self.layout) for shard in self.shards)

    @property
    def buffer_bytes(self) -> int:
        """Memory that one writer needs in addition to its source's weights."""
        return self.chunk_tokens * _bytes_per_token(self.layout, self.source)

    def is_recorded(self) -> bool:
        """Whether the directory was prepared for this plan, and its build is not over."""
        path = self.lut_dir / PLAN_NAME
        return path.is_file() and path.read_bytes() == self.text.encode()

    def companion(self, name: str) -> bytes | None:
        """Return the content of the file of token counts or of row ids; None if the table has no such file."""
        values = {COUNTS_NAME: self.token_counts, ROW_IDS_NAME: self.source.row_ids}[name]
        if values is None:
            return None
        return save({name.partition(".")[0]: values.to(torch.int64).contiguous()})


def _digest(content: bytes | None) -> str | None:
    return None if content is None else sha256(content)


def plan(
    source: RowSource,
    lut_dir: Path,
    *,
    dtype: str = "bfloat16",
    chunk_tokens: int | None = None,
    memory_bytes: int = MEMORY_BYTES,
    shard_bytes: int = SHARD_BYTES,
    resume: bool = True,
    tokenizer: str | None = None,
    token_counts: Tensor | None = None,
) -> BuildPlan:
    """Decide layout, shards and chunks from the arguments of `build_lut`; writes nothing to disk.

    To resume is to keep the chunks of an unfinished build, because rows computed in chunks of another size may round
    differently. LutError when the precision is unknown or cannot pack this hidden size, or a table would be made of
    itself.
    """
    if isinstance(source, TableRows) and source.lut_dir.resolve() == lut_dir.resolve():
        raise LutError(f"{lut_dir}: is the table that the rows come from; give the new one another --lut name")
    layout = TableLayout.of(source.config, dtype, shard_bytes)
    if source.row_ids is not None:
        if not len(source.row_ids):
            raise LutError(f"{lut_dir}: no id has a row, as if the model had seen no text; train it first")
        layout = replace(layout, sparse_rows=len(source.row_ids))
    if isinstance(source, TableRows):
        tokenizer = source.tokenizer if tokenizer is None else tokenizer
        token_counts = source.token_counts if token_counts is None else token_counts
    decided = BuildPlan(
        source=source,
        lut_dir=lut_dir,
        layout=layout,
        shards=tuple(plan_shards(layout)),
        chunk_tokens=chunk_tokens or _chunk_tokens(layout, source, memory_bytes),
        tokenizer=tokenizer,
        token_counts=token_counts,
    )
    unfinished = replace(decided, chunk_tokens=_recorded(lut_dir, "chunk_tokens", int) or decided.chunk_tokens)
    return unfinished if resume and unfinished.is_recorded() else decided


def recorded_precision(lut_dir: Path) -> str | None:
    """Return the precision of the table in a directory, finished or not; None if there is none."""
    with suppress(LutError):
        return read_manifest(lut_dir).layout.precision
    return _recorded(lut_dir, "precision", str)


def _recorded(lut_dir: Path, key: str, kind: type[T]) -> T | None:
    """Return a value of the plan that an unfinished build left in a directory."""
    try:
        value = json.loads((lut_dir / PLAN_NAME).read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return value if isinstance(value, kind) else None


def _bytes_per_token(layout: TableLayout, source: RowSource) -> int:
    layer_floats = _FLOAT_BYTES * layout.num_experts * layout.hidden_size
    encoded = 2 * layout.row_bytes  # one chunk is written while the next is computed
    return encoded + _LAYER_COPIES * layer_floats + source.held_row_bytes


def _chunk_tokens(layout: TableLayout, source: RowSource, memory_bytes: int) -> int:
    """Cut shards into as few equal chunks as the memory allows."""
    most = max(1, memory_bytes // _bytes_per_token(layout, source))
    in_shard = min(tokens_per_shard(layout), layout.num_rows)
    return -(-in_shard // -(-in_shard // most))
