"""How expert rows become bytes and back. A codec knows one precision; nothing here knows files or shards.

A stored row is one token id: for each layer, for each expert, the codes of a hidden vector and, in packed
precisions, its scales, so that one token stays one contiguous read.

U rows, L layers, E experts, D hidden.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from src.errors import LutError


class Codec(Protocol):
    """One precision: encodes (U, L, E, D) float rows to (U, row_bytes) uint8 and decodes them."""

    @property
    def dtype(self) -> torch.dtype:
        """What decoded rows have."""
        ...

    def vector_bytes(self, hidden_size: int) -> int:
        """Bytes of one expert's vector of `hidden_size` values, scales included."""
        ...

    def encode(self, vectors: Tensor) -> Tensor:
        """Encode (..., D) floating vectors to (..., vector_bytes) uint8."""
        ...

    def decode(self, codes: Tensor, hidden_size: int) -> Tensor:
        """Decode (..., vector_bytes) uint8 to (..., D) in `dtype`."""
        ...


@dataclass(frozen=True)
class FloatCodec:
    """A plain floating-point precision: rows are readable by any safetensors user."""

    dtype: torch.dtype

    def vector_bytes(self, hidden_size: int) -> int:
        """Bytes of one vector."""
        return hidden_size * self.dtype.itemsize

    def encode(self, vectors: Tensor) -> Tensor:
        """Round to `dtype`, to nearest even."""
        return vectors.to(self.dtype).contiguous().view(torch.uint8)

    def decode(self, codes: Tensor, hidden_size: int) -> Tensor:
        """Reinterpret the bytes; no copy."""
        return codes.view(self.dtype)


CODECS: dict[str, Codec] = {
    "float32": FloatCodec(torch.float32),
    "bfloat16": FloatCodec(torch.bfloat16),
    "float16": FloatCodec(torch.float16),
}


def codec(precision: str) -> Codec:
    """Return the codec of a precision's name; LutError names the known ones."""
    try:
        return CODECS[precision]
    except KeyError:
        raise LutError(f"precision {precision!r} is unknown; choose one of {', '.join(CODECS)}") from None
