"""The packed precisions in plain loops over single values: the oracle for `src.lut.codecs`.

It shares nothing with the package but the order of bytes: each vector's codes, most significant bit first, then its
scales as little-endian float16.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

QLORA_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""arXiv:2305.14314, Appendix E."""
NF3 = (
    -1.0,
    -0.5350227355957031,
    -0.2469314038753510,
    0.0,
    0.1833375245332718,
    0.3819939494132996,
    0.6229856610298157,
    1.0,
)
"""As other public implementations of three-bit normal floats print it, in float32."""


@dataclass(frozen=True)
class Encoded:
    """One vector: its bytes, and what they stand for."""

    stored: bytes
    values: list[float]


def half(value: float) -> float:
    """Round to float16."""
    return struct.unpack("<e", struct.pack("<e", value))[0]


def encode_int8(vector: Sequence[float]) -> Encoded:
    scale = half(max(abs(value) for value in vector))
    codes = [max(-127, min(127, round(value / scale * 127))) if scale else 0 for value in vector]
    return Encoded(struct.pack(f"<{len(vector)}be", *codes, scale), [code / 127 * scale for code in codes])


def encode_normal_float(vector: Sequence[float], levels: Sequence[float], block_size: int) -> Encoded:
    bits, codes, scales = (len(levels) - 1).bit_length(), list[int](), list[float]()
    for start in range(0, len(vector), block_size):
        block = vector[start : start + block_size]
        scales.append(half(max(abs(value) for value in block)))
        codes += [_nearest(value / scales[-1] if scales[-1] else 0.0, levels) for value in block]
    text = "".join(format(code, f"0{bits}b") for code in codes)
    packed = bytes(int(text[start : start + 8], 2) for start in range(0, len(text), 8))
    values = [levels[code] * scales[index // block_size] for index, code in enumerate(codes)]
    return Encoded(packed + struct.pack(f"<{len(scales)}e", *scales), values)


def _nearest(value: float, levels: Sequence[float]) -> int:
    return min(range(len(levels)), key=lambda code: (abs(value - levels[code]), code))
