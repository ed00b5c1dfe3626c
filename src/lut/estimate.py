"""What a build will take, found out without writing anything: size, memory, and time from a small trial."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from src.lut.plan import BuildPlan
from src.lut.quantization import codec
from src.lut.shard_writer import encode_layer

_TRIAL_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What `estimate` found."""

    table_bytes: int
    """Size of all shards."""
    num_shards: int
    free_bytes: int
    """Free space where the table would lie."""
    memory_bytes: int
    """Buffers of one rank, beside the weights that its source reads."""
    seconds: float
    """Time to compute and encode every row with one rank; a disk that is slower than that takes longer."""

    @property
    def fits(self) -> bool:
        """Whether the disk has room."""
        return self.table_bytes <= self.free_bytes


def estimate(plan: BuildPlan) -> Estimate:
    """Compute and encode one layer of a few rows, and scale up; leaves no trace on disk."""
    layout = plan.layout
    num_tokens = min(_TRIAL_TOKENS, layout.vocab_size)
    _trial(plan, num_tokens)  # the first run also reads weights and starts threads
    seconds = _trial(plan, num_tokens)
    return Estimate(
        table_bytes=plan.file_bytes,
        num_shards=len(plan.shards),
        free_bytes=shutil.disk_usage(_existing(plan.lut_dir)).free,
        memory_bytes=plan.buffer_bytes,
        seconds=seconds * layout.num_layers * layout.vocab_size / num_tokens,
    )


def _trial(plan: BuildPlan, num_tokens: int) -> float:
    layout = plan.layout
    start = time.perf_counter()
    rows = plan.source.layer_rows(0, 0, num_tokens)  # (U, E, D)
    codes = torch.empty(num_tokens, layout.num_experts, layout.vector_bytes, dtype=torch.uint8, device=rows.device)
    encode_layer(codec(layout.precision), rows, codes).tolist()  # `tolist` waits for a device
    return time.perf_counter() - start


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.resolve().parent)
