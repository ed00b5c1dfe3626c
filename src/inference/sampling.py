"""Choosing the next token from logits. Knows neither models nor text.

B batch, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 0.0
    """0 is greedy; otherwise logits are divided by it."""
    top_k: int | None = None
    """Draw among the k most likely ids only."""
    top_p: float | None = None
    """Draw among the most likely ids that together reach this probability, in (0, 1]."""
    seed: int | None = None
    """Makes drawing repeatable: row i of a batch draws as a batch of its own with seed + i would."""

    def __post_init__(self) -> None:
        """Raise ValueError on values out of range."""
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}, but it must not be negative; 0 is greedy")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}, but it must be at least 1; leave it out to draw among all ids")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, but it must lie in (0, 1]; leave it out to draw among all ids")


class Sampler:
    """Draws ids for a batch; every row has a random generator of its own, so its neighbors do not matter."""

    def __init__(self, sampling: Sampling, batch_size: int) -> None:
        """Seed a generator per row; without a seed, from torch's global generator."""
        self._sampling = sampling
        seeds = (
            torch.randint(2**62, (batch_size,)) if sampling.seed is None else sampling.seed + torch.arange(batch_size)
        )
        greedy = sampling.temperature == 0
        self._generators = [] if greedy else [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    def __call__(self, logits: Tensor) -> Tensor:
        """Draw ids (B,) from logits (B, V)."""
        if self._sampling.temperature == 0:
            return logits.max(dim=-1).indices  # the first of equals, as argmax, in a quarter of its time on a CPU
        probs = truncated_probs(logits, self._sampling)  # (B, V)
        cumulative = probs.double().cumsum(dim=-1)  # (B, V)
        uniform = torch.stack(
            [torch.rand(1, generator=generator, dtype=torch.float64) for generator in self._generators]
        )
        targets = uniform.to(logits.device) * cumulative[:, -1:]  # (B, 1)
        drawn = torch.searchsorted(cumulative, targets, right=True).squeeze(1)  # (B,): never an id of probability 0
        return drawn.clamp(max=logits.shape[-1] - 1)


def truncated_probs(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the probabilities (B, V) float32 that are drawn from; ids cut off by top-k or top-p have 0."""
    logits = logits.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        threshold = logits.topk(sampling.top_k, dim=-1).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if sampling.top_p is not None:
        ranked, order = logits.sort(dim=-1, descending=True)
        probs = ranked.softmax(dim=-1)
        beyond = probs.cumsum(dim=-1) - probs >= sampling.top_p  # the most likely id always stays
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return logits.softmax(dim=-1)
