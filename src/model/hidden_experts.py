"""Routed experts that read hidden states: the MoE baseline, and the steps between it and MoLE.

What they return depends on the context, so it cannot become a table; they belong to the backbone.

B batch, T tokens, N = B*T, D hidden, F intermediate, E experts, K experts mixed per token.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from src.model.experts import StackedExperts, weighted_sum
from src.model.products import product
from src.model.router import Routing


class HiddenExperts(StackedExperts):
    """E two-matrix FFNs on hidden states, mixed by what the router decided; no token is ever dropped."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        """Create the stacked weights."""
        super().__init__(num_experts, hidden_size, intermediate_size)
        self._grouped: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = _run_grouped

    def keep_groups_eager(self) -> None:
        """Keep the loop over groups out of compiled graphs: sizes change every step, each would be compiled anew."""
        eager: Any = torch.compiler.disable(_run_grouped)  # not a decorator: that imports the compiler, in seconds
        self._grouped = eager

    def mixture(self, hidden_states: Tensor, routing: Routing) -> Tensor:
        """Return sum_j g_j * FFN_j(h) over the chosen experts as (B, T, D), of normed hidden states (B, T, D)."""
        inputs = hidden_states.flatten(0, 1)  # (N, D)
        if routing.experts is None:
            mixed = self._mix_all(inputs, routing.weights.flatten(0, 1))
        else:
            mixed = self._mix_chosen(inputs, routing.weights.flatten(0, 1), routing.experts.flatten(0, 1))
        return mixed.view(hidden_states.shape)  # (B, T, D)

    def _mix_all(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """Mix every expert: together they are one FFN of width E*F whose activations are scaled by `weights` (N, E).

        The sum over experts happens inside the last matrix product, so no (N, E, D) tensor exists.
        """
        wide_up = self.up.transpose(0, 1).flatten(1)  # (D, E*F)
        inner = F.gelu(product(inputs, wide_up)).unflatten(-1, (len(self.up), -1))  # (N, E, F)
        inner = inner * weights.unsqueeze(-1).to(inner.dtype)  # (N, E, F)
        return product(inner.flatten(1), self.down.flatten(0, 1))  # (N, D)

    def _mix_chosen(self, inputs: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Mix the `experts` (N, K) of each token: sort the N*K assignments by expert, so each runs once on its tokens.

        Nothing here adds in an order that may change, so recomputing it in the backward pass routes alike.
        """
        top_k = experts.shape[1]
        order = experts.flatten().argsort(stable=True)  # (N*K,) assignments, expert by expert
        counts = experts.flatten().new_zeros(len(self.up)).scatter_add(0, experts.flatten(), torch.ones_like(order))
        outputs = self._grouped(inputs.index_select(0, order // top_k), counts, self.up, self.down)  # (N*K, D)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))  # (N*K,)
        return weighted_sum(outputs, place.view(-1, top_k), weights)  # (N, D)


def _run_grouped(grouped: Tensor, counts: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Run expert e of weights (E, D, F) and (E, F, D) on the next `counts[e]` rows of (N*K, D)."""
    # `unbind` gives the stacked weight one gradient; indexing would give it a full-size one per expert.
    groups = zip(grouped.split(counts.tolist()), up.unbind(0), down.unbind(0), strict=True)
    return torch.cat([product(F.gelu(product(tokens, up)), down) for tokens, up, down in groups if len(tokens)])
