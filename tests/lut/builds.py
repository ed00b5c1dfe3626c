"""Sources and models for tests of the builder."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.lut import Manifest, build_lut
from src.lut.layout import TableLayout
from src.model import ModelConfig, Transformer
from src.run_directory import Identity

SHARD_BYTES = 6000
"""Cuts `small_model`'s float32 table into shards of 5 ids."""


def small_model(hidden_size: int = 32, vocab_size: int = 23) -> Transformer:
    """A MoLE with random weights, norms included, and rows that are not tiny."""
    config = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=3,
        num_heads=2,
        intermediate_size=16,
        num_experts=3,
        expert_intermediate_size=24,
        init_std=0.3,
    )
    torch.manual_seed(1)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    return model


class FixedRows:
    """The rows of a tensor (V, L, E, D); `before` is called ahead of each chunk with its first id."""

    identity = Identity(backbone="b" * 64, training_form="t" * 64)
    rows_from = "a test"
    held_row_bytes = 0
    row_ids = None

    def __init__(self, rows: Tensor, before: Callable[[int], None] | None = None) -> None:
        vocab_size, num_layers, num_experts, hidden_size = rows.shape
        self.config = TableLayout(
            vocab_size=vocab_size,
            num_layers=num_layers,
            num_experts=num_experts,
            hidden_size=hidden_size,
            precision="float32",
        )
        self._rows, self._before = rows, before

    def layer_rows(self, layer: int, first_token: int, num_tokens: int) -> Tensor:
        if layer == 0 and self._before is not None:
            self._before(first_token)
        return self._rows[first_token : first_token + num_tokens, layer]


def random_rows(vocab_size: int = 23, hidden_size: int = 32) -> Tensor:
    """Rows (V, 3, 3, D)."""
    return torch.randn(vocab_size, 3, 3, hidden_size, generator=torch.Generator().manual_seed(2))


def build_on_ranks(source: FixedRows | Transformer, lut_dir: Path, world_size: int, **options: Any) -> list[Manifest]:
    """Build with `world_size` ranks, each a thread of its own; raises what the first of them raised."""
    barrier = threading.Barrier(world_size, timeout=60)

    def build(rank: int) -> Manifest:
        try:
            return build_lut(source, lut_dir, rank=rank, world_size=world_size, barrier=barrier.wait, **options)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(world_size) as ranks:
        return list(ranks.map(build, range(world_size)))


def contents(lut_dir: Path) -> dict[str, bytes]:
    """Every file of a table."""
    return {path.name: path.read_bytes() for path in sorted(lut_dir.iterdir())}
