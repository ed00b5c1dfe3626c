"""How close two forms of a model are: differences of logits, and greedy continuations.

N windows, B batch, T tokens, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from src.inference.generation import generate
from src.model import Transformer

NEAR_TIE = 1e-4
"""Two best logits closer than this may swap by rounding alone."""


@dataclass(frozen=True, kw_only=True)
class LogitDistance:
    """How far the logits of two forms are apart on the same windows."""

    max_abs: float
    mean_abs: float
    top1_agreement: float
    """Share of positions where both forms would pick the same next token."""
    tokens: int

    def to_dict(self) -> dict[str, float]:
        """Return all figures by name."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class GreedyComparison:
    """Greedy continuations of two forms from the same prompts."""

    prompts: int
    new_tokens: int
    identical: int
    """Prompts whose continuations agree token for token."""
    near_ties: int
    """Prompts that part first where the reference's two best logits are closer than `NEAR_TIE`."""
    widest_gap: float
    """Largest gap between the reference's two best logits at a first parting; 0 when nothing parts."""

    @property
    def holds(self) -> bool:
        """Whether every prompt is identical or parts at a near-tie."""
        return self.identical + self.near_ties == self.prompts

    def to_dict(self) -> dict[str, float | bool]:
        """Return all figures by name."""
        return {**asdict(self), "holds": self.holds}


@torch.no_grad()
def logit_distance(
    reference: Transformer,
    other: Transformer,
    windows: Tensor,
    *,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> LogitDistance:
    """Compare next-token logits on `windows` (N, T) int64."""
    largest, total, agreed, count = 0.0, 0.0, 0, 0
    for token_ids in windows.split(batch_size):
        expected, found = reference(token_ids), other(token_ids)  # (B, T, V)
        difference = (expected.double() - found.double()).abs()
        largest = max(largest, difference.max().nan_to_num(nan=math.inf).item())  # NaN is no agreement
        total += difference.sum().item()
        agreed += int((expected.argmax(-1) == found.argmax(-1)).sum())
        count += difference.numel()
        if progress is not None:
            progress(len(token_ids))
    tokens = windows.numel()
    return LogitDistance(max_abs=largest, mean_abs=total / count, top1_agreement=agreed / tokens, tokens=tokens)


@torch.no_grad()
def compare_greedy(reference: Transformer, other: Transformer, prompts: Tensor, *, new_tokens: int) -> GreedyComparison:
    """Continue `prompts` (N, T) greedily in both forms and look at where they part."""
    expected = generate(reference, prompts, max_new_tokens=new_tokens)
    found = generate(other, prompts, max_new_tokens=new_tokens)
    identical, near_ties, widest = 0, 0, 0.0
    for row in range(len(prompts)):
        parted = (expected[row] != found[row]).nonzero()
        if not len(parted):
            identical += 1
            continue
        prefix = expected[row : row + 1, : int(parted[0])]
        best = reference(prefix)[0, -1].topk(2).values
        gap = float(best[0] - best[1])
        near_ties += gap < NEAR_TIE
        widest = max(widest, gap)
    return GreedyComparison(
        prompts=len(prompts), new_tokens=new_tokens, identical=identical, near_ties=near_ties, widest_gap=widest
    )
