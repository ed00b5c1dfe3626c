"""How the tables under `fixtures/v1` were made; run once, when version 1 of the format was settled.

`python -m tests.lut.fixtures_v1 DIRECTORY` makes them again, in whatever version the code writes now.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from src.lut import build_lut
from tests.lut.builds import FixedRows

PRECISIONS = ("bfloat16", "int8", "nf4", "nf3")
VOCAB_SIZE, NUM_LAYERS, NUM_EXPERTS, HIDDEN_SIZE = 5, 2, 2, 128


def fixture_rows() -> Tensor:
    """Rows (V, L, E, D) by formula: multiples of 1/8 that every precision meets in its own way; id 3 is all zeros."""
    sizes = (VOCAB_SIZE, NUM_LAYERS, NUM_EXPERTS, HIDDEN_SIZE)
    token, layer, expert, position = torch.meshgrid(*map(torch.arange, sizes), indexing="ij")
    values = (7 * token + 5 * layer + 3 * expert + position * position) % 17 - 8
    return (values * (token != 3)).float() / 8


def write_fixtures(directory: Path) -> None:
    """Write one table of each precision, in two shards, with token counts."""
    for precision in PRECISIONS:
        row_bytes = {"bfloat16": 1024, "int8": 520, "nf4": 264, "nf3": 200}[precision]
        build_lut(
            FixedRows(fixture_rows()),
            directory / precision,
            dtype=precision,
            shard_bytes=3 * row_bytes,
            tokenizer="c" * 64,
            token_counts=torch.tensor([9, 4, 2, 0, 1]),
        )


if __name__ == "__main__":
    write_fixtures(Path(sys.argv[1]))
