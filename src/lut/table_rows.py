"""An existing table as the source of another: how a table changes its precision without the training form."""

from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor

from src.errors import LutFormatError
from src.lut.integrity import sha256
from src.lut.manifest import COUNTS_NAME, read_manifest
from src.lut.quantization import codec
from src.lut.scan import TableScan


class TableRows:
    """Decoded rows of a table; identities, tokenizer and token counts are carried over from it."""

    def __init__(self, lut_dir: Path) -> None:
        """Open the table; LutError when it is not whole."""
        manifest = read_manifest(lut_dir)
        self.config, self.identity, self.tokenizer = manifest.layout, manifest, manifest.tokenizer
        self.rows_from = f"table in {manifest.precision}, its rows from {manifest.rows_from}"
        self.held_row_bytes = manifest.row_bytes
        self.token_counts = read_token_counts(lut_dir, manifest.token_counts_sha256)
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


def read_token_counts(lut_dir: Path, expected_sha256: str | None) -> Tensor | None:
    """Return a table's token counts (V,) int64, or None where it came without; LutFormatError when they are damaged."""
    if expected_sha256 is None:
        return None
    path = lut_dir / COUNTS_NAME
    if not path.is_file():
        raise LutFormatError(f"{path}: missing, but the manifest lists it; copy the table again")
    content = path.read_bytes()
    if (found := sha256(content)) != expected_sha256:
        raise LutFormatError(f"{path}: its SHA-256 is {found}, expected {expected_sha256}; copy the table again")
    return load(content)["token_counts"]
