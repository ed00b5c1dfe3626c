"""Expert rows that are computed once for all micro-batches of an optimizer step.

Every micro-batch mixes the same rows, and their gradients add up. Each micro-batch but the last gets the rows as an
autograd leaf. The last one gets them attached to the experts: its backward pass carries the accumulated gradients
through the experts once, as DDP requires, which refuses a second gradient for a parameter.

A micro-batches, B batch, T tokens, U unique token ids of the whole step, E experts, D hidden.
"""

import torch
from torch import Tensor

from src.model.experts import ExpertRows
from src.model.transformer import Transformer


class StepRows:
    """The rows of every distinct id of an optimizer step, for all layers at once."""

    def __init__(self, model: Transformer, token_ids: Tensor, distinct: tuple[Tensor, Tensor] | None = None) -> None:
        """Compute the rows of `token_ids` (A, B, T) with the experts of `model`, which must be embedding experts.

        `distinct` is that of `Transformer.expert_rows`.
        """
        rows = model.expert_rows(token_ids, distinct)
        assert rows is not None
        self._inverse = rows.inverse  # (A, B, T)
        layers = range(len(model.config.mixture_layers))
        self._live = [_wide(rows.layer_rows(layer)) for layer in layers]  # of (U, E, D) each
        self._leaves = [rows.detach().requires_grad_() for rows in self._live]

    def micro_batch(self, index: int) -> ExpertRows:
        """Return the rows for micro-batch `index`: attached to the experts for the last one, a leaf for the others."""
        last = index + 1 == len(self._inverse)
        return ExpertRows((self._live if last else self._leaves).__getitem__, self._inverse[index])

    def carried(self) -> Tensor:
        """Return a scalar without meaning to add to the last objective; its gradient is the other micro-batches'."""
        with torch.autocast(self._inverse.device.type, enabled=False):  # which would round the sums
            parts = [
                live.transpose(0, 1).flatten() @ leaf.grad.transpose(0, 1).flatten()
                for live, leaf in zip(self._live, self._leaves, strict=True)
                if leaf.grad is not None  # there is none with a single micro-batch
            ]
        return torch.stack(parts).sum() if parts else torch.zeros((), device=self._inverse.device)


def _wide(rows: Tensor) -> Tensor:
    """At least float32, in which the gradients of all micro-batches are summed."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))
