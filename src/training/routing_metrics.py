"""Routing during training and validation, as a torchmetrics metric.

B batch, T tokens, L layers with experts, C choices of their routers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from src.model.router import load_balance_loss, router_entropy, router_probs, z_loss


class RoutingMetrics(Metric):
    """Entropy, largest expert share, load-balance loss and z-loss per layer and over all, averaged over updates."""

    full_state_update = False
    share: Tensor
    scalars: Tensor
    updates: Tensor

    def __init__(self, layers: Sequence[int], num_choices: int, top_k: int | None) -> None:
        super().__init__()
        self.layers, self.top_k = tuple(layers), top_k
        self.add_state("share", torch.zeros(len(self.layers), num_choices), dist_reduce_fx="sum")
        self.add_state("scalars", torch.zeros(3, len(self.layers)), dist_reduce_fx="sum")
        self.add_state("updates", torch.tensor(0), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, router_logits: list[Tensor]) -> None:
        """Add one micro-batch: per layer (B, T, C) logits."""
        for layer, logits in enumerate(router_logits):
            self.share[layer] += router_probs(logits).flatten(0, -2).mean(dim=0)
            self.scalars[0, layer] += router_entropy(logits)
            self.scalars[1, layer] += load_balance_loss(logits, self.top_k)
            self.scalars[2, layer] += z_loss(logits)
        self.updates += 1

    def compute(self) -> dict[str, Tensor]:
        """Return `router/NAME`, the mean over layers (of the share: the largest), and `router/NAME/layer_i`."""
        if not self.updates:
            return {}
        max_share = (self.share / self.updates).amax(dim=1)  # (L,)
        entropy, load_balance, z = self.scalars / self.updates
        metrics = {"router/max_share": max_share.max()}
        for name, values in (("entropy", entropy), ("load_balance_loss", load_balance), ("z_loss", z)):
            metrics[f"router/{name}"] = values.mean()
            metrics |= self._by_layer(name, values)
        return metrics | self._by_layer("max_share", max_share)

    def _by_layer(self, name: str, values: Tensor) -> dict[str, Tensor]:
        return {f"router/{name}/layer_{layer}": value for layer, value in zip(self.layers, values, strict=True)}
