"""What a codec is: how expert vectors of one precision become bytes and back. Knows neither files nor shards.

A stored row is one token id: for each layer, for each expert, the codes of a hidden vector and, in packed
precisions, its scales behind them. So one token is one contiguous read, and any layer of it can be decoded alone.

D hidden.
"""

from typing import Protocol

import torch
from torch import Tensor


class Codec(Protocol):
    """One precision: encodes (..., D) floating vectors to (..., vector_bytes) uint8 and decodes them."""

    @property
    def dtype(self) -> torch.dtype:
        """What decoded rows have."""
        ...

    def vector_bytes(self, hidden_size: int) -> int:
        """Bytes of one expert's vector of `hidden_size` values, scales included; LutError when it cannot be packed."""
        ...

    def encode(self, vectors: Tensor) -> Tensor:
        """Encode (..., D) floating vectors to (..., vector_bytes) uint8; packed ones refuse what is not finite."""
        ...

    def decode(self, codes: Tensor, hidden_size: int) -> Tensor:
        """Decode (..., vector_bytes) uint8 to (..., D) in `dtype`."""
        ...
