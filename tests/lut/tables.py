"""Tables of random rows for tests of readers and stores, and the bytes that they must return."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from src.lut import build_lut
from src.lut.layout import SHARD_BYTES, TableLayout, plan_shards
from src.lut.manifest import read_manifest
from src.model import ModelConfig
from src.run_directory import Identity


class RandomRows:
    """A source of rows that follow from layer and token id alone, whatever the chunks."""

    identity = Identity(backbone="b" * 64, training_form="t" * 64)
    rows_from = "random numbers"
    held_row_bytes = 0
    row_ids = None

    def __init__(self, vocab_size: int, num_layers: int, num_experts: int, hidden_size: int) -> None:
        self.config = ModelConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=1,
            intermediate_size=8,
            num_experts=num_experts,
            expert_intermediate_size=8,
        )

    def layer_rows(self, layer: int, first_token: int, num_tokens: int) -> Tensor:
        shape = (self.config.vocab_size, self.config.num_experts, self.config.hidden_size)
        rows = torch.randn(shape, generator=torch.Generator().manual_seed(layer))
        return rows[first_token : first_token + num_tokens]


def write_table(
    lut_dir: Path,
    *,
    vocab_size: int = 300,
    num_layers: int = 2,
    num_experts: int = 3,
    hidden_size: int = 128,
    dtype: str = "bfloat16",
    token_counts: Tensor | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> NDArray[np.uint8]:
    """Build a table in `lut_dir` and return its stored rows (V, row_bytes), read the plainest way there is."""
    source = RandomRows(vocab_size, num_layers, num_experts, hidden_size)
    build_lut(source, lut_dir, dtype=dtype, token_counts=token_counts, shard_bytes=shard_bytes)
    return stored_rows(lut_dir)


def stored_rows(lut_dir: Path) -> NDArray[np.uint8]:
    """Return (V, row_bytes) as they lie in the files."""
    layout = read_manifest(lut_dir).layout
    parts: list[NDArray[np.uint8]] = []
    for shard in plan_shards(layout):
        data = (lut_dir / shard.file_name).read_bytes()
        start = shard.rows_offset(layout)
        rows = np.frombuffer(data[start : start + shard.num_tokens * layout.row_bytes], dtype=np.uint8)
        parts.append(rows.reshape(shard.num_tokens, layout.row_bytes))
    return np.concatenate(parts)


def shard_path(lut_dir: Path, layout: TableLayout, index: int = 0) -> Path:
    """Return the path of one shard."""
    return lut_dir / plan_shards(layout)[index].file_name
