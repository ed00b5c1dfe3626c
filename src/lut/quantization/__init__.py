"""How expert rows become bytes and back, in every precision a table can have."""

from src.lut.quantization.choice import CODECS, codec
from src.lut.quantization.codec import Codec
from src.lut.quantization.floats import FloatCodec

__all__ = ["CODECS", "Codec", "FloatCodec", "codec"]
