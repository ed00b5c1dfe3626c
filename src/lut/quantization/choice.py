"""The precisions a table can have, by name."""

import torch

from src.errors import LutError
from src.lut.quantization.code_books import NF3, NF4
from src.lut.quantization.codec import Codec
from src.lut.quantization.floats import FloatCodec
from src.lut.quantization.int8 import Int8Codec
from src.lut.quantization.normal_float import NormalFloatCodec

CODECS: dict[str, Codec] = {
    "float32": FloatCodec(torch.float32),
    "bfloat16": FloatCodec(torch.bfloat16),
    "float16": FloatCodec(torch.float16),
    "int8": Int8Codec(),
    "nf4": NormalFloatCodec("nf4", NF4),
    "nf3": NormalFloatCodec("nf3", NF3, block_size=128),
}


def codec(precision: str) -> Codec:
    """Return the codec of a precision's name; LutError names the known ones."""
    try:
        return CODECS[precision]
    except KeyError:
        raise LutError(f"precision {precision!r} is unknown; choose one of {', '.join(CODECS)}") from None
