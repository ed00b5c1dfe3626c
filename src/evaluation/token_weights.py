"""How much weight the routers give each expert where one token occurs in real text.

B windows, T tokens, L layers, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from src.model import Transformer
from src.model.router import router_probs


@dataclass(frozen=True, kw_only=True)
class TokenWeights:
    """The routers' weights at a token's occurrences."""

    occurrences: int
    shares: Tensor | None
    """(L, E): mean weight of each expert, rows sum to 1; None where the token does not occur."""


def windows_with(windows: Tensor, token_id: int, limit: int) -> Tensor:
    """Return the inputs (B, T) of at most `limit` windows (N, T+1) that hold the token."""
    inputs = windows[:, :-1]
    return inputs[(inputs == token_id).any(dim=1)][:limit]


@torch.no_grad()
def measure_token_weights(
    model: Transformer, inputs: Tensor, token_id: int, *, progress: Callable[[int], None] | None = None
) -> TokenWeights:
    """Run inputs (B, T) int64, one window at a time, and average the routing where the token occurs."""
    sums, occurrences = torch.zeros(model.config.num_layers, model.config.num_experts), 0
    for window in inputs.unsqueeze(1):  # (1, T)
        here = window == token_id  # (1, T)
        logits = model.trunk(window).router_logits
        sums += torch.stack([router_probs(layer)[here].float().sum(dim=0) for layer in logits])  # (L, E)
        occurrences += int(here.sum())
        if progress is not None:
            progress(1)
    return TokenWeights(occurrences=occurrences, shares=sums / occurrences if occurrences else None)
