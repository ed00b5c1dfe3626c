"""Plain floating-point precisions: their rows are readable by any safetensors user."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FloatCodec:
    """Stores values as they are, rounded to `dtype`."""

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
