"""Three and four bits a value: the nearest level of a normal-float code book, relative to its block's scale.

Codes are packed into words of whole bytes, the first value in the highest bits. A word is decoded by one lookup in a
table of everything a word can say: 256 pairs for NF4, 4,096 quadruples for NF3.

D hidden, N blocks of K values, W words in D values.
"""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from src.errors import LutError
from src.lut.quantization.scales import SCALE_BYTES, absmax_scales, read_scales, relative, scale_bytes


@dataclass(frozen=True)
class NormalFloatCodec:
    """D * bits / 8 bytes of codes, then one scale per block of `block_size` values (None: the whole vector)."""

    name: str
    levels: tuple[float, ...]
    block_size: int | None = None
    dtype: torch.dtype = torch.float32

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return (len(self.levels) - 1).bit_length()

    def vector_bytes(self, hidden_size: int) -> int:
        """Bytes of one vector; LutError when blocks do not divide it."""
        multiple = self.block_size or 2
        if hidden_size % multiple:
            raise LutError(
                f"{self.name} packs values by {multiple}, but model.hidden_size is {hidden_size}; "
                f"choose another precision, or a hidden size that is a multiple of {multiple}"
            )
        return self._code_bytes(hidden_size) + hidden_size // (self.block_size or hidden_size) * SCALE_BYTES

    def encode(self, vectors: Tensor) -> Tensor:
        """Take the nearest level; a value in the middle of two takes the lower one."""
        self.vector_bytes(vectors.shape[-1])  # refuses sizes that cannot be packed
        blocks = vectors.unflatten(-1, (-1, self.block_size or vectors.shape[-1]))  # (..., N, K)
        scales = absmax_scales(blocks)  # (..., N)
        codes = _nearest(relative(blocks, scales).flatten(-2), self.levels)  # (..., D)
        packed = _pack4(codes) if self.bits == 4 else _pack3(codes)  # (..., D * bits / 8)
        return torch.cat([packed, scale_bytes(scales)], dim=-1)

    def decode(self, codes: Tensor, hidden_size: int) -> Tensor:
        """Look words up and multiply each block by its scale."""
        code_bytes = self._code_bytes(hidden_size)
        packed, scales = codes[..., :code_bytes], read_scales(codes[..., code_bytes:])  # (..., N)
        words = packed if self.bits == 4 else _words12(packed)  # (..., W)
        values = _look_up(_word_table(self.levels, codes.device), words)  # (..., W, D / W)
        blocks = values.view(*scales.shape, -1)  # (..., N, K)
        return blocks.mul_(scales.unsqueeze(-1)).flatten(-2)  # (..., D)

    def _code_bytes(self, hidden_size: int) -> int:
        return hidden_size * self.bits // 8


def _nearest(values: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Return the codes (..., D) uint8 of values (..., D): how many midpoints between levels lie below each."""
    midpoints = [(lower + upper) / 2 for lower, upper in pairwise(levels)]
    if values.device.type != "cpu":
        return torch.bucketize(values, torch.tensor(midpoints).to(values)).to(torch.uint8)
    array = values.numpy()  # here fifteen vectorized comparisons are ten times as fast as a search per value
    codes = np.zeros(array.shape, dtype=np.uint8)
    for midpoint in midpoints:
        codes += array > midpoint
    return torch.from_numpy(codes)


def _pack4(codes: Tensor) -> Tensor:
    """Pack (..., D) codes below 16 into (..., D / 2) bytes."""
    first, second = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return first << 4 | second


def _pack3(codes: Tensor) -> Tensor:
    """Pack (..., D) codes below 8, eight of them into three bytes: (..., D * 3 / 8)."""
    a, b, c, d, e, f, g, h = codes.unflatten(-1, (-1, 8)).unbind(-1)
    # Shifts of uint8 drop what leaves the byte, so a code on a border needs no mask.
    packed = (a << 5 | b << 2 | c >> 1, c << 7 | d << 4 | e << 1 | f >> 2, f << 6 | g << 3 | h)
    return torch.stack(packed, dim=-1).flatten(-2)


def _words12(packed: Tensor) -> Tensor:
    """Split (..., D * 3 / 8) bytes into words of 12 bits, four codes each: (..., D / 4) int16."""
    first, second, third = packed.to(torch.int16).unflatten(-1, (-1, 3)).unbind(-1)
    return torch.stack((first << 4 | second >> 4, (second & 15) << 8 | third), dim=-1).flatten(-2)


def _look_up(table: Tensor, words: Tensor) -> Tensor:
    """Return a fresh `table[words]`: (..., W, values of a word)."""
    if words.device.type == "cpu":  # NumPy takes small integers as they are, and is ten times as fast as torch
        return torch.from_numpy(np.take(table.numpy(), words.numpy(), axis=0))
    return torch.nn.functional.embedding(words.int(), table)


@cache
def _word_table(levels: tuple[float, ...], device: torch.device) -> Tensor:
    """All words and their values: (256, 2) for 16 levels, (4096, 4) for 8."""
    values_per_word = 2 if len(levels) == 16 else 4
    values = torch.tensor(levels, dtype=torch.float32)
    return torch.cartesian_prod(*[values] * values_per_word).to(device)
