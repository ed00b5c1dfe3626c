"""The scale that packed codes are relative to: the largest absolute value of a block, as a float16 in two bytes.

D values of a vector, N blocks of K values each.
"""

import torch
from torch import Tensor

from src.errors import LutError

SCALE_BYTES = 2


def absmax_scales(blocks: Tensor) -> Tensor:
    """Return the scales (..., N) float16 of (..., N, K); LutError where a value is not finite or beyond float16."""
    scales = blocks.abs().amax(dim=-1).to(torch.float16)  # (..., N); NaN and infinity come through
    if not scales.isfinite().all():
        raise LutError(
            "a row holds NaN, infinity or a value above 65,504, which packed precisions cannot scale; "
            "check the weights, or store the table in float32 or bfloat16"
        )
    return scales


def relative(blocks: Tensor, scales: Tensor) -> Tensor:
    """Divide (..., N, K) by the scales (..., N) as they will be read back; about [-1, 1], and 0 where the scale is."""
    divisors = scales.to(torch.promote_types(blocks.dtype, torch.float32))
    return blocks / divisors.masked_fill(divisors == 0, torch.inf).unsqueeze(-1)  # (..., N, K)


def scale_bytes(scales: Tensor) -> Tensor:
    """Return (..., N) float16 as (..., 2N) uint8."""
    return scales.contiguous().view(torch.uint8)


def read_scales(codes: Tensor) -> Tensor:
    """Return (..., 2N) uint8, however it is aligned, as (..., N) float32."""
    return codes.contiguous().view(torch.float16).to(torch.float32)  # `contiguous` copies odd offsets to even ones
