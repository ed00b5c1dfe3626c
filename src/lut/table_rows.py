"""An existing table as the source of another: how a table changes its precision without the training form."""

from pathlib import Path

import torch
from torch import Tensor

from src.lut.manifest import read_manifest
from src.lut.opening import check_shard, read_token_counts
from src.lut.quantization import codec
from src.lut.scan import TableScan


class TableRows:
    """Decoded rows of a table; identities, tokenizer and token counts are carried over from it."""

    def __init__(self, lut_dir: Path) -> None:
        """Open the table; LutError when it is not whole."""
        self.lut_dir = lut_dir
        manifest = read_manifest(lut_dir)
        self.config, self.identity, self.tokenizer = manifest.layout, manifest, manifest.tokenizer
        self.rows_from = f"table in {manifest.precision}, its rows from {manifest.rows_from}"
        self.held_row_bytes = manifest.row_bytes
        for record in manifest.shards:
            check_shard(lut_dir, record)
        counts = read_token_counts(lut_dir, manifest)
        self.token_counts = None if counts is None else torch.from_numpy(counts)
        self._codec, self._scan = codec(manifest.precision), TableScan(lut_dir, manifest.layout)
        self._run, self._rows = (0, 0), torch.empty(0, dtype=torch.uint8)

    def layer_rows(self, layer: int, first_token: int, num_tokens: int) -> Tensor:
        """Decode one layer of consecutive rows (num_tokens, E, D); the run's bytes are read and checked once."""
        layout = self.config
        if self._run != (first_token, num_tokens):
            self._rows = torch.empty(0, dtype=torch.uint8)  # let go of the last run before the next is read
            self._rows, self._run = (
                torch.from_numpy(self._scan.read(first_token, num_tokens)),
                (first_token, num_tokens),
            )
        vectors = self._rows.view(num_tokens, layout.num_layers, layout.num_experts, layout.vector_bytes)[:, layer]
        return self._codec.decode(vectors, layout.hidden_size).to(torch.float32)
