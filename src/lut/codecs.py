"""Codecs: how the expert vectors of one precision become bytes and back. Knows neither files nor shards.

A stored row belongs to one token id: for each layer and each expert the codes of one vector, followed in packed
precisions by the vector's scales. So one token is one contiguous read, and any layer of it can be decoded alone.

A codec carries all that is specific to a precision. To add one, subclass `Codec` and pass an instance to
`register_codec`: its name then works in `--dtype`, in `lut.dtype` and in `verify`.

L layers, E experts, D hidden, N blocks of K values in a vector, W words in a vector.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from statistics import NormalDist
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from src.errors import LutError


@dataclass(frozen=True, kw_only=True)
class Codec(ABC):
    """One precision: encodes (..., D) floating vectors to (..., vector_bytes) uint8 and decodes them."""

    name: str
    """What `--dtype`, `lut.dtype` and manifests call it."""
    help: str
    """A few words for `--help`."""
    loss_limit: float
    """Largest change of the held-out loss, in nats per token, that `verify` accepts."""
    dtype: torch.dtype = torch.float32
    """What decoded rows have."""
    is_view: ClassVar[bool] = False
    """Whether `decode` returns a view of the stored bytes: it can then be made before they have been read."""

    @abstractmethod
    def vector_bytes(self, hidden_size: int) -> int:
        """Bytes of one expert's vector of `hidden_size` values, scales included; LutError when it cannot be packed."""

    @abstractmethod
    def encode(self, vectors: Tensor) -> Tensor:
        """Encode (..., D) floating vectors to (..., vector_bytes) uint8; packed codecs refuse NaN and infinity."""

    @abstractmethod
    def decode(self, codes: Tensor, hidden_size: int) -> Tensor:
        """Decode (..., vector_bytes) uint8 to (..., D) in `dtype`."""

    def stored_as(self, num_layers: int, num_experts: int, hidden_size: int) -> tuple[str, tuple[int, ...]]:
        """Return the safetensors dtype and the shape of one token's row: bytes, unless a codec says otherwise."""
        return "U8", (num_layers * num_experts * self.vector_bytes(hidden_size),)


@dataclass(frozen=True, kw_only=True)
class FloatCodec(Codec):
    """Stores values as they are, rounded to `dtype`, so that any safetensors user can read the rows."""

    safetensors_dtype: str
    is_view = True

    def vector_bytes(self, hidden_size: int) -> int:
        return hidden_size * self.dtype.itemsize

    def encode(self, vectors: Tensor) -> Tensor:
        """Round to `dtype`, to nearest even."""
        return vectors.to(self.dtype).contiguous().view(torch.uint8)

    def decode(self, codes: Tensor, hidden_size: int) -> Tensor:
        return codes.view(self.dtype)

    def stored_as(self, num_layers: int, num_experts: int, hidden_size: int) -> tuple[str, tuple[int, ...]]:
        return self.safetensors_dtype, (num_layers, num_experts, hidden_size)


SCALE_BYTES = 2


def absmax_scales(blocks: Tensor) -> Tensor:
    """Return the scales (..., N) float16 of (..., N, K); LutError where a value is not finite or beyond float16."""
    scales = blocks.abs().amax(dim=-1).to(torch.float16).contiguous()  # (..., N); NaN and infinity come through
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


def read_scales(codes: Tensor) -> Tensor:
    """Return (..., 2N) uint8, however it is aligned, as (..., N) float32."""
    return codes.contiguous().view(torch.float16).to(torch.float32)  # `contiguous` copies odd offsets to even ones


_LARGEST = 127


class Int8Codec(Codec):
    """Eight bits a value: D signed bytes, then the scale of the vector; a value is code / 127 * scale."""

    def vector_bytes(self, hidden_size: int) -> int:
        return hidden_size + SCALE_BYTES

    def encode(self, vectors: Tensor) -> Tensor:
        """Round to the nearest level, ties to even."""
        scales = absmax_scales(vectors.unsqueeze(-2))  # (..., 1)
        levels = relative(vectors.unsqueeze(-2), scales).squeeze(-2).mul_(_LARGEST)  # (..., D)
        codes = levels.round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8)  # a scale rounded down ends just above 127
        return torch.cat([codes.view(torch.uint8), scales.view(torch.uint8)], dim=-1)  # (..., D + 2)

    def decode(self, codes: Tensor, hidden_size: int) -> Tensor:
        scales = read_scales(codes[..., hidden_size:])  # (..., 1)
        return codes[..., :hidden_size].view(torch.int8).to(torch.float32).mul_(scales / _LARGEST)  # (..., D)


@dataclass(frozen=True, kw_only=True)
class NormalFloatCodec(Codec):
    """Three or four bits a value: the nearest level of a normal-float code book, relative to its block's scale.

    A vector is D * bits / 8 bytes of codes, then one scale per block. Codes are packed into words of whole bytes, the
    first value in the highest bits. A word is decoded by one lookup in a table of every possible word: 256 pairs for
    NF4, 4,096 quadruples for NF3.
    """

    levels: tuple[float, ...]
    block_size: int | None = None
    """Values that share a scale; None: the whole vector."""

    @property
    def bits(self) -> int:
        return (len(self.levels) - 1).bit_length()

    def vector_bytes(self, hidden_size: int) -> int:
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
        return torch.cat([packed, scales.view(torch.uint8)], dim=-1)  # (..., D * bits / 8 + 2N)

    def decode(self, codes: Tensor, hidden_size: int) -> Tensor:
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


# Normal-float code books (arXiv:2305.14314): levels that normally distributed values use about equally often. They are
# quantiles of N(0, 1), scaled to [-1, 1], with an exact zero; of 2^k levels, 2^(k-1) are positive.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The 16 published values (arXiv:2305.14314, Appendix E)."""


def normal_float(bits: int) -> tuple[float, ...]:
    """Construct the code book of `bits` bits, in ascending order; `normal_float(4)` is NF4 to seven digits.

    The outermost quantile lies halfway between those that cut 2^k and 2^k - 1 equal parts in half; from it, each
    side takes equal steps of probability toward the median.
    """
    levels = 2**bits
    outermost = 1 - (1 / (2 * levels) + 1 / (2 * (levels - 1))) / 2
    quantile = NormalDist().inv_cdf

    def side(count: int) -> list[float]:
        step = (outermost - 0.5) / count
        return [quantile(outermost - step * index) for index in range(count)]

    values = [*(-value for value in side(levels // 2 - 1)), 0.0, *reversed(side(levels // 2))]
    return tuple(value / values[-1] for value in values)


NF3 = normal_float(3)
"""The 8 values that the construction gives for three bits; arXiv:2305.14314 prints four bits only."""


CODECS: dict[str, Codec] = {}
"""The precisions that a table can have, by name; `register_codec` adds to them."""


def register_codec(codec: Codec) -> None:
    """Make a codec available by its name; ValueError when the name is taken."""
    if codec.name in CODECS:
        raise ValueError(f"a codec named {codec.name!r} is registered already; choose another name")
    CODECS[codec.name] = codec


def find_codec(precision: str) -> Codec:
    """Return the codec of that name; LutError lists the registered ones."""
    try:
        return CODECS[precision]
    except KeyError:
        raise LutError(f"precision {precision!r} is unknown; choose one of {', '.join(CODECS)}") from None


def plain_codecs() -> dict[torch.dtype, Codec]:
    """Return, by dtype, the codecs whose stored rows are the values themselves."""
    return {codec.dtype: codec for codec in CODECS.values() if codec.is_view}


register_codec(
    FloatCodec(name="float32", help="4 bytes a value", loss_limit=1e-5, dtype=torch.float32, safetensors_dtype="F32")
)
register_codec(
    FloatCodec(name="bfloat16", help="2 bytes a value", loss_limit=1e-4, dtype=torch.bfloat16, safetensors_dtype="BF16")
)
register_codec(
    FloatCodec(
        name="float16",
        help="2 bytes a value, none above 65,504",
        loss_limit=1e-4,
        dtype=torch.float16,
        safetensors_dtype="F16",
    )
)
register_codec(Int8Codec(name="int8", help="1 byte a value", loss_limit=3e-4))
register_codec(NormalFloatCodec(name="nf4", help="4 bits a value, even hidden sizes only", loss_limit=3e-3, levels=NF4))
register_codec(
    NormalFloatCodec(
        name="nf3",
        help="3 bits a value, hidden sizes that are multiples of 128",
        loss_limit=1.5e-2,
        levels=NF3,
        block_size=128,
    )
)
