"""Eight bits a value: 255 evenly spaced levels, one scale per expert vector.

D hidden.
"""

import torch
from torch import Tensor

from src.lut.quantization.scales import SCALE_BYTES, absmax_scales, read_scales, relative, scale_bytes

_LARGEST = 127


class Int8Codec:
    """D signed bytes, then the scale; a value is code / 127 * scale."""

    dtype = torch.float32

    def vector_bytes(self, hidden_size: int) -> int:
        """Bytes of one vector."""
        return hidden_size + SCALE_BYTES

    def encode(self, vectors: Tensor) -> Tensor:
        """Round to the nearest level, ties to even."""
        scales = absmax_scales(vectors.unsqueeze(-2))  # (..., 1)
        levels = relative(vectors.unsqueeze(-2), scales).squeeze(-2).mul_(_LARGEST)  # (..., D)
        codes = levels.round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8)  # a scale rounded down ends just above 127
        return torch.cat([codes.view(torch.uint8), scale_bytes(scales)], dim=-1)  # (..., D + 2)

    def decode(self, codes: Tensor, hidden_size: int) -> Tensor:
        """Multiply the levels by their scale."""
        scales = read_scales(codes[..., hidden_size:])  # (..., 1)
        return codes[..., :hidden_size].view(torch.int8).to(torch.float32).mul_(scales / _LARGEST)  # (..., D)
