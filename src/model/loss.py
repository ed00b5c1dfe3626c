"""The language-model loss, the same for training, validation and scoring.

Logits over the vocabulary are the largest tensor of a small model. They are computed for a few tokens at a time and
never stored: in training each chunk's gradient is computed together with its loss, so the backward pass has nothing to
recompute.

N tokens, C tokens of a chunk, D hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from src.model.products import Head, computed_dtype

CHUNK_BYTES, ACCELERATOR_CHUNK_BYTES = 128 * 2**20, 512 * 2**20
"""Logits in memory at a time, on a CPU and elsewhere; smaller chunks read and write the head's gradient more often."""
CACHE_BYTES = 8 * 2**20
"""Float32 values that a CPU works on at a time, so that they stay in its cache."""


def token_losses(hidden_states: Tensor, head: Head, targets: Tensor) -> Tensor:
    """Return the cross-entropy in nats of each target (B, T), computed in at least float32; for scoring.

    `hidden_states` is (B, T, D), `head` maps to V logits.
    """
    chunk = _chunk_tokens(len(head.weight), 4, hidden_states.device)
    hidden_chunks, target_chunks = hidden_states.flatten(0, 1).split(chunk), targets.flatten().split(chunk)
    losses = [
        F.cross_entropy(_widened(head(hidden)), wanted, reduction="none")
        for hidden, wanted in zip(hidden_chunks, target_chunks, strict=True)
    ]
    return torch.cat(losses).view_as(targets)


def next_token_loss(hidden_states: Tensor, head: Head, targets: Tensor) -> Tensor:
    """Return the mean of `token_losses`, with gradients for `hidden_states` and `head`.

    It has no double backward. Under autocast the matrix products run in its dtype; the head's gradient is summed over
    chunks in at least float32.
    """
    hidden = hidden_states.flatten(0, -2)  # (N, D)
    return _MeanLoss.apply(hidden, head.weight, targets.flatten(), computed_dtype(hidden))


class _MeanLoss(torch.autograd.Function):
    """Mean cross-entropy of `hidden @ weight.T`; computes the gradients together with the loss."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the mean loss of hidden (N, D) against targets (N,) for a head of weight (V, D)."""
        with torch.autocast(hidden.device.type, enabled=False):
            wide = torch.promote_types(dtype, torch.float32)
            projection = weight.to(dtype)
            wants_hidden, wants_weight, *_ = ctx.needs_input_grad
            hidden_gradient = torch.empty_like(hidden) if wants_hidden else None
            weight_gradient = torch.zeros(weight.shape, dtype=wide, device=weight.device) if wants_weight else None
            total = torch.zeros((), dtype=wide, device=hidden.device)
            step = _chunk_tokens(len(weight), dtype.itemsize, weight.device)
            for start in range(0, len(hidden), step):
                part = slice(start, start + step)
                inputs = hidden[part].to(dtype)  # (C, D)
                logits = inputs @ projection.T  # (C, V)
                total += _turn_into_gradient(logits, targets[part], wide)
                if hidden_gradient is not None:
                    hidden_gradient[part] = logits @ projection
                if weight_gradient is not None:
                    _add(weight_gradient, logits.T @ inputs)
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.num_tokens = len(hidden)
        return total / len(hidden)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub forbids every override
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Scale what `forward` computed for the sum over tokens to the mean's incoming gradient."""
        scale = gradients[0] / ctx.num_tokens
        scaled = (None if computed is None else computed * scale for computed in ctx.saved_tensors)
        return (*scaled, None, None)


def _turn_into_gradient(logits: Tensor, targets: Tensor, wide: torch.dtype) -> Tensor:
    """Return the summed loss of logits (C, V), and overwrite them with its gradient."""
    losses: list[Tensor] = []
    rows = _rows_at_a_time(logits)
    for part, wanted in zip(logits.split(rows), targets.split(rows), strict=True):
        log_probs = part.log_softmax(dim=-1, dtype=wide)
        index = wanted.unsqueeze(-1)
        losses.append(-log_probs.gather(-1, index).sum())
        probs = torch.exp(log_probs, out=log_probs)
        part.copy_(probs.scatter_add_(-1, index, probs.new_full((len(wanted), 1), -1.0)))
    return torch.stack(losses).sum()


def _add(total: Tensor, summand: Tensor) -> None:
    """Add (V, D) of any type to a wide total, in parts: torch widens the summand first."""
    rows = _rows_at_a_time(total)
    for target, part in zip(total.split(rows), summand.split(rows), strict=True):
        target.add_(part)


def _rows_at_a_time(matrix: Tensor) -> int:
    """Return the rows that fit a CPU's cache, or all rows on an accelerator."""
    return max(1, CACHE_BYTES // (4 * matrix.shape[1])) if matrix.device.type == "cpu" else len(matrix)


def _widened(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _chunk_tokens(vocab_size: int, value_bytes: int, device: torch.device) -> int:
    """Return the tokens of a chunk, a multiple of 64 if above 64: 1,334 tokens take 1.5x as long as 1,344."""
    most = CHUNK_BYTES if device.type == "cpu" else ACCELERATOR_CHUNK_BYTES
    limit = max(1, most // (value_bytes * vocab_size))
    return limit - limit % 64 or limit
