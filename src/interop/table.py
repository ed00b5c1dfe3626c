"""`moe_table`, the authors' one table for all layers, into our format and back; memory never holds it.

V vocabulary, L layers, E experts, D hidden.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from src.errors import CheckpointError
from src.interop.names import TABLE_NAME
from src.interop.reader import CheckpointTensors
from src.lut import LutStore, build_lut
from src.lut.codecs import plain_codecs
from src.model import ModelConfig
from src.run_directory import Identity
from src.system.console import Progress
from src.system.files import atomic_path

CHUNK_BYTES = 64 * 2**20


@dataclass
class OfficialRows:
    """A row source for the table builder that reads `moe_table` instead of computing."""

    config: ModelConfig
    identity: Identity
    checkpoint: CheckpointTensors
    rows_from: str = "imported table"
    held_row_bytes: int = 0
    row_ids: None = None

    def layer_rows(self, layer: int, first_token: int, num_tokens: int) -> Tensor:
        """Read one layer's columns of consecutive rows as (num_tokens, E, D)."""
        width = self.config.num_experts * self.config.hidden_size
        rows, columns = slice(first_token, first_token + num_tokens), slice(layer * width, (layer + 1) * width)
        block = self.checkpoint.block(TABLE_NAME, rows, columns).float()  # (num_tokens, E*D)
        return block.unflatten(1, (self.config.num_experts, self.config.hidden_size))


def import_table(rows: OfficialRows, lut_dir: Path, tokenizer: str | None, where: Path, progress: Progress) -> None:
    """Write the table in the precision that it has; `tokenizer` is the fingerprint of its vocabulary."""
    dtype, codecs = rows.checkpoint.block(TABLE_NAME, slice(0, 1), slice(0, 1)).dtype, plain_codecs()
    if dtype not in codecs:
        names = ", ".join(codec.name for codec in codecs.values())
        raise CheckpointError(f"{where}: {TABLE_NAME} is {dtype}, but a table is one of {names}; convert it")
    build_lut(rows, lut_dir, dtype=codecs[dtype].name, tokenizer=tokenizer, progress=progress)


def export_table(store: LutStore, path: Path, progress: Progress) -> int:
    """Write every row to a safetensors file that holds `moe_table` (V, L*E*D) alone; return the table's bytes.

    Packed precisions are written as the floating-point numbers that they decode to.
    """
    layout, dtype = store.layout, store.gather(torch.zeros(1, dtype=torch.int64)).dtype
    sizes = layout.num_layers, layout.num_experts, layout.hidden_size
    safetensors_dtype, row_values = plain_codecs()[dtype].stored_as(*sizes)[0], math.prod(sizes)
    table_bytes = layout.vocab_size * row_values * dtype.itemsize
    chunk_tokens = max(1, CHUNK_BYTES // (row_values * dtype.itemsize))
    with (
        atomic_path(path) as temporary,
        temporary.open("wb") as file,
        progress("writing the table (rows)", layout.vocab_size) as advance,
    ):
        file.write(_safetensors_header(safetensors_dtype, (layout.vocab_size, row_values), table_bytes))
        for token_ids in torch.arange(layout.vocab_size).split(chunk_tokens):
            rows = store.gather(token_ids)  # (chunk, L, E, D)
            file.write(rows.contiguous().view(torch.uint8).numpy().data)
            advance(len(token_ids))
    return table_bytes


def _safetensors_header(dtype: str, shape: tuple[int, int], num_bytes: int) -> bytes:
    entry = {"dtype": dtype, "shape": list(shape), "data_offsets": [0, num_bytes]}
    text = json.dumps({"__metadata__": {"format": "pt"}, TABLE_NAME: entry}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
