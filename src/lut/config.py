"""Which table a fit writes."""

from dataclasses import dataclass

from src.errors import ConfigError
from src.lut.quantization import CODECS


@dataclass(frozen=True, kw_only=True)
class LutConfig:
    """The re-parameterisation callback."""

    at_fit_end: bool = True
    """Write weights and table when training is done; models without embedding experts write weights only."""
    dtype: str = "bfloat16"
    """Precision of the rows: float32, bfloat16, float16, int8, nf4 (even hidden sizes) or nf3 (multiples of 128)."""
    chunk_tokens: int | None = None
    """Rows computed and written at a time; null takes as many as fit 512 MiB of buffers."""

    def __post_init__(self) -> None:
        """Raise ConfigError on values out of range."""
        if self.dtype not in CODECS:
            raise ConfigError(f"lut.dtype: {self.dtype!r}, but it must be one of {', '.join(CODECS)}")
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise ConfigError(f"lut.chunk_tokens: {self.chunk_tokens}, but it must be at least 1")
