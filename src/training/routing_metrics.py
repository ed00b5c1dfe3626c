"""What the routers did, as a torchmetrics metric.

B batch, T tokens, E experts, L layers.
"""

import torch
from torch import Tensor
from torchmetrics import Metric

from src.model.router import load_balance_loss, router_entropy, router_probs, z_loss


class RoutingMetrics(Metric):
    """Entropy, expert shares, load-balance loss and z-loss per layer and in the mean, averaged over updates."""

    full_state_update = False
    share: Tensor
    scalars: Tensor
    updates: Tensor

    def __init__(self, num_layers: int, num_experts: int, top_k: int | None) -> None:
        """Prepare sums for L layers of E experts."""
        super().__init__()
        self.top_k = top_k
        self.add_state("share", torch.zeros(num_layers, num_experts), dist_reduce_fx="sum")
        self.add_state("scalars", torch.zeros(3, num_layers), dist_reduce_fx="sum")
        self.add_state("updates", torch.tensor(0), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, router_logits: list[Tensor]) -> None:
        """Add one micro-batch: per layer (B, T, E) logits."""
        for layer, logits in enumerate(router_logits):
            self.share[layer] += router_probs(logits).flatten(0, -2).mean(dim=0)
            self.scalars[0, layer] += router_entropy(logits)
            self.scalars[1, layer] += load_balance_loss(logits, self.top_k)
            self.scalars[2, layer] += z_loss(logits)
        self.updates += 1

    def compute(self) -> dict[str, Tensor]:
        """Return `router/...` values: means over layers, then each layer, then each expert's share of probability."""
        if not self.updates:
            return {}
        share, scalars = self.share / self.updates, self.scalars / self.updates
        metrics: dict[str, Tensor] = {}
        for name, values in zip(("entropy", "load_balance_loss", "z_loss"), scalars, strict=True):
            metrics[f"router/{name}"] = values.mean()
            metrics.update({f"router/{name}/layer_{layer}": value for layer, value in enumerate(values)})
        metrics["router/max_share"] = share.max()
        for layer, shares in enumerate(share):
            metrics.update(
                {f"router/share/layer_{layer}/expert_{expert}": value for expert, value in enumerate(shares)}
            )
        return metrics
