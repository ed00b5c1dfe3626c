"""Loss on windows of text, of any form of a model, in nats, perplexity and bits per byte.

Ranks share the work by batches. Batches are cut before they are distributed, so the results do not depend on the
number of ranks. Knows neither where windows come from nor which positions may see each other.

N windows, B batch, T tokens, V vocabulary.
"""

import itertools
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

import torch
from torch import Tensor

from src.model import Transformer
from src.model.experts import ExpertRows
from src.model.loss import token_losses
from src.system.console import Advance, no_advance

Batch = TypeVar("Batch")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Share:
    """Which rank this process is, of how many that compute together."""

    rank: int = 0
    world_size: int = 1

    def map(
        self, compute: Callable[[Batch], Result], batches: Sequence[Batch], advance: Advance = no_advance
    ) -> list[Result]:
        """Return `compute` of every batch, in order, on every rank; each rank computes every `world_size`-th.

        All ranks call `compute` equally often, with a batch that has its result already where none is left: a model
        whose parameters are shared out needs every rank in each of its passes.
        """
        own: dict[int, Result] = {}
        for first in range(0, len(batches), self.world_size):
            index = min(first + self.rank, len(batches) - 1)
            own[index] = compute(batches[index])
            advance(min(self.world_size, len(batches) - first))
        merged = {index: result for part in self._gathered(own) for index, result in part.items()}
        return [merged[index] for index in range(len(batches))]

    def _gathered(self, own: dict[int, Result]) -> list[dict[int, Result]]:
        parts = [own] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(parts, own)
        return parts


Mask = Callable[[Tensor], Tensor | None]
"""From token ids (B, T) to booleans (B, T, T), which positions may attend to which; None lets each see all before."""
RowsOf = Callable[[Tensor], ExpertRows | None]
"""From token ids (B, T) to the expert rows that a model mixes there in place of its own."""


def no_mask(token_ids: Tensor) -> None:
    """Let each position see all before it."""


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
        """Exponential of the loss; infinite from 710 nats on, where float64 ends."""
        return math.exp(self.loss) if not self.loss >= 709.78 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits needed per byte of text: comparable over vocabularies, and with compressors."""
        return self.loss * self.tokens / math.log(2) / self.bytes

    def to_dict(self) -> dict[str, float]:
        return {**asdict(self), "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}


@torch.no_grad()
def window_losses(
    model: Transformer,
    windows: Tensor,
    *,
    batch_size: int = 16,
    share: Share = Share(),
    progress: Advance = no_advance,
    mask: Mask = no_mask,
    rows_of: RowsOf | None = None,
) -> Tensor:
    """Return the loss of each predicted token (N, T) in nats, on the CPU; ranks of `share` take turns with batches.

    `progress` is called with the number of windows that were just scored.
    """
    device = model.embedding.weight.device

    def losses(batch: Tensor) -> Tensor:
        token_ids, targets = batch[:, :-1].to(device), batch[:, 1:].to(device)  # (B, T)
        rows = None if rows_of is None else rows_of(token_ids)
        trunk = model.trunk(token_ids, attention_mask=mask(token_ids), expert_rows=rows)
        return token_losses(trunk.hidden_states, model.head, targets).cpu()  # (B, T)

    batches = windows.split(batch_size)
    scored = iter(batches)

    def advance(count: int) -> None:
        for batch in itertools.islice(scored, count):
            progress(len(batch))

    return torch.cat(share.map(losses, batches, advance))


def summarize(losses: Tensor, windows: Tensor, byte_lengths: Tensor) -> Score:
    """Return the score of `windows` (N, T+1) whose tokens have `losses` (N, T)."""
    targets = windows[:, 1:]
    total = losses.double().sum().item()
    return Score(loss=total / targets.numel(), tokens=targets.numel(), bytes=int(byte_lengths[targets].sum()))


@dataclass(frozen=True, kw_only=True)
class Band:
    """Loss over the tokens whose ids are about equally frequent in the training text."""

    least: int
    """Smallest count in the training text."""
    most: int
    """Largest count."""
    tokens: int
    loss: float

    @property
    def name(self) -> str:
        return f"{self.least:,}" if self.least == self.most else f"{self.least:,}-{self.most:,}"


def loss_by_frequency(losses: Tensor, token_ids: Tensor, token_counts: Tensor) -> list[Band]:
    """Split `losses` (N, T) by how often `token_ids` (N, T) occur in the training text: never, 1-9, 10-99, ... times.

    Rare ids are where a model that looks rows up may differ from others. `token_counts` is (V,) int64; bands without
    tokens are left out.
    """
    counts = token_counts[token_ids]  # (N, T)
    bands: list[Band] = []
    least, most = 0, 0
    while least <= int(counts.max()):
        inside = losses[(counts >= least) & (counts <= most)].double()
        if len(inside):
            bands.append(Band(least=least, most=most, tokens=len(inside), loss=inside.mean().item()))
        least, most = most + 1, 10 * most + 9
    return bands


def zlib_bits_per_byte(text: str) -> float:
    """Bits per byte of `zlib -9` on the text: what a general-purpose compressor makes of it."""
    raw = text.encode()
    return 8 * len(zlib.compress(raw, level=9)) / len(raw)
