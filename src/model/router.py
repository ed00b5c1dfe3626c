"""The router, what it decides per token, and the losses that measure its balance.

B batch, T tokens, D hidden, E experts, K experts mixed per token (E when all are active), C choices: E, or E + 1 with
a null expert.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Routing(NamedTuple):
    """What a router decides for each token."""

    logits: Tensor
    """(B, T, C), as the projection returned them."""
    weights: Tensor
    """(B, T, K) mixture weights, at least float32; what they lack to sum to 1 is the null expert's."""
    experts: Tensor | None
    """(B, T, K) int64 indices of the mixed experts; None when all E are mixed in order."""


class Router(nn.Module):
    """A linear router without bias: softmax over all experts, or over the `top_k` largest logits.

    With a null expert, the softmax has one more outcome, the last, which adds nothing.
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int | None, *, null_expert: bool = False) -> None:
        super().__init__()
        self.top_k, self.null_expert = top_k, null_expert
        self.weight = nn.Parameter(torch.empty(num_experts + null_expert, hidden_size))  # (C, D)

    def forward(self, hidden_states: Tensor) -> Routing:
        """Route (B, T, D) hidden states, already normed, in at least float32, also under autocast.

        Routing is sensitive to rounding, and small bfloat16 products are slower on CPUs anyway.
        """
        logits = _wide_products(hidden_states, self.weight)  # (B, T, C)
        if self.top_k is None:
            probs = logits.softmax(dim=-1)
            return Routing(logits, probs[..., :-1] if self.null_expert else probs, None)
        chosen, experts = logits.topk(self.top_k, dim=-1)  # (B, T, K)
        return Routing(logits, chosen.softmax(dim=-1), experts)


def _wide_products(hidden_states: Tensor, weight: Tensor) -> Tensor:
    """Return (B, T, C): hidden states (B, T, D) times a weight (C, D), in at least float32, also under autocast.

    A decode step does this in every layer, and each call here is a good part of what a table costs it.
    """
    if weight.dtype.itemsize < 4:
        weight = weight.float()
    device, inputs = hidden_states.device.type, hidden_states.to(weight.dtype)
    if device != "meta" and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return nn.functional.linear(inputs, weight)
    if device == "cpu" and inputs.shape[1] == 1:  # in half the time, beside other batched products
        return torch.bmm(inputs, weight.mT.expand(len(inputs), -1, -1))
    return nn.functional.linear(inputs, weight)


def router_probs(logits: Tensor) -> Tensor:
    """Softmax over the last dimension in at least float32 (a literal float32 would forbid float64 tests)."""
    return logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def load_balance_loss(logits: Tensor, top_k: int | None) -> Tensor:
    """E * sum_e f_e * p_e over (..., E) logits: 1 when balanced, E when one expert takes all (Switch, OLMoE).

    p_e is the mean probability of expert e, and carries the gradient. f_e is the share of assignments that e
    receives: counted over the `top_k` choices, or, where every expert is active, over each token's first choice.
    """
    num_experts = logits.shape[-1]
    logits = logits.reshape(-1, num_experts)  # (B*T, E)
    mean_probs = router_probs(logits).mean(dim=0)  # (E,)
    chosen = logits.topk(top_k or 1, dim=-1).indices.flatten()  # (B*T*K,)
    counts = chosen.new_zeros(num_experts).scatter_add(0, chosen, torch.ones_like(chosen))  # `bincount` waits for CUDA
    share = counts.to(mean_probs.dtype) / chosen.numel()  # (E,)
    return num_experts * (share * mean_probs).sum()


def z_loss(logits: Tensor) -> Tensor:
    """Mean squared log-partition of (..., E) router logits (ST-MoE); keeps logits from drifting."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).logsumexp(dim=-1).square().mean()


def router_entropy(logits: Tensor) -> Tensor:
    """Mean entropy in nats of the full softmax over (..., E): ln E when undecided, 0 when certain."""
    log_probs = logits.log_softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return -(log_probs.exp() * log_probs).sum(dim=-1).mean()
