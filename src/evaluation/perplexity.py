"""Loss on held-out windows, of any form of a model, in nats, perplexity and bits per byte.

N windows, B batch, T tokens, V vocabulary.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from src.model import Transformer
from src.model.loss import token_losses

Progress = Callable[[int], None]
"""Called with the number of windows that were just scored."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Language-model loss over some text."""

    loss: float
    """Mean nats per token."""
    tokens: int
    """Tokens that were predicted."""
    bytes: int
    """UTF-8 bytes that those tokens stand for."""

    @property
    def perplexity(self) -> float:
        """Exponential of the loss."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Bits needed per byte of text: comparable over vocabularies, and with compressors."""
        return self.loss * self.tokens / math.log(2) / self.bytes

    def to_dict(self) -> dict[str, float]:
        """Return all figures by name."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


@torch.no_grad()
def score_windows(
    model: Transformer,
    windows: Tensor,
    byte_lengths: Tensor,
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Score:
    """Score next-token prediction on `windows` (N, T+1) int64; `byte_lengths` (V,) are bytes per id."""
    device = model.embedding.weight.device
    total = 0.0
    for batch in windows.split(batch_size):
        token_ids = batch.to(device)
        losses = token_losses(model.hidden_states(token_ids[:, :-1]), model.head, token_ids[:, 1:])  # (B, T)
        total += losses.double().sum().item()
        if progress is not None:
            progress(len(batch))
    targets = windows[:, 1:]
    return Score(loss=total / targets.numel(), tokens=targets.numel(), bytes=int(byte_lengths[targets].sum()))


def zlib_bits_per_byte(text: str) -> float:
    """Bits per byte of `zlib -9` on the text: what a general-purpose compressor makes of it."""
    raw = text.encode()
    return 8 * len(zlib.compress(raw, level=9)) / len(raw)
