"""The language-model loss. One place, so that training, validation and scoring mean the same number.

B batch, T tokens, D hidden, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def token_losses(hidden_states: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """Return the cross-entropy in nats of each target (B, T), computed in at least float32.

    `hidden_states` is (B, T, D), `head` maps to (B, T, V).
    """
    logits = head(hidden_states)  # (B, T, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def next_token_loss(hidden_states: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """Return the mean of `token_losses`: the paper's whole objective for MoLE."""
    return token_losses(hidden_states, head, targets).mean()
