"""Work in batches, dealt out to ranks. Knows nothing of what a batch is.

Batches are cut before they are dealt, so what is computed does not depend on how many ranks there are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

Batch = TypeVar("Batch")
Result = TypeVar("Result")
Advance = Callable[[int], None]
"""Called with the number of batches that were just computed, by all ranks together."""


@dataclass(frozen=True)
class Share:
    """Which rank this process is, of how many that compute together."""

    rank: int = 0
    world_size: int = 1

    def map(
        self, compute: Callable[[Batch], Result], batches: Sequence[Batch], advance: Advance | None = None
    ) -> list[Result]:
        """Return `compute` of every batch, in order, on every rank; each rank computes every `world_size`-th.

        All ranks call `compute` equally often, with a batch that has its result already where none is left: a model
        whose parameters are shared out needs every rank in each of its passes.
        """
        own: dict[int, Result] = {}
        for first in range(0, len(batches), self.world_size):
            index = min(first + self.rank, len(batches) - 1)
            own[index] = compute(batches[index])
            if advance is not None:
                advance(min(self.world_size, len(batches) - first))
        merged: dict[int, Result] = {}
        for part in self._gathered(own):
            merged |= part
        return [merged[index] for index in range(len(batches))]

    def _gathered(self, own: dict[int, Result]) -> list[dict[int, Result]]:
        if self.world_size == 1:
            return [own]
        parts: list[dict[int, Result]] = [{} for _ in range(self.world_size)]
        torch.distributed.all_gather_object(parts, own)
        return parts
