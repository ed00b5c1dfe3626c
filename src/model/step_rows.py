"""Expert rows that are computed once for all micro-batches of an optimiser step.

Every micro-batch mixes the same rows, and their gradients add up. So the rows are computed once, each micro-batch but
the last sees them as an autograd leaf, and the last sees them live: its one backward pass carries the gradients that
the others left through the experts. One pass is also what DDP wants, which refuses to see a parameter twice.

A micro-batches, B batch, T tokens, U unique token ids of the whole step, E experts, D hidden.
"""

import torch
from torch import Tensor

from src.model.experts import ExpertRows
from src.model.transformer import Transformer


class StepRows:
    """The rows of every distinct id of an optimiser step, for all layers at once."""

    def __init__(self, model: Transformer, token_ids: Tensor) -> None:
        """Compute the rows of `token_ids` (A, B, T) with the experts of `model`, which must be embedding experts."""
        assert model.experts is not None
        ids, self._inverse = token_ids.unique(return_inverse=True)
        layer_rows = model.experts.rows(ids, model.embedding(ids))
        self._live = [_wide(layer_rows(layer)) for layer in range(model.config.num_layers)]  # L of (U, E, D)
        self._leaves = [rows.detach().requires_grad_() for rows in self._live]

    def micro_batch(self, index: int) -> ExpertRows:
        """Return the rows for micro-batch `index`; live for the last one, a leaf that collects gradients for others."""
        last = index + 1 == len(self._inverse)
        return ExpertRows((self._live if last else self._leaves).__getitem__, self._inverse[index])

    def carried(self) -> Tensor:
        """Return a scalar to add to the last objective: its gradient is what the other micro-batches left on the rows.

        Its value means nothing.
        """
        with torch.autocast(self._inverse.device.type, enabled=False):  # or the sums would be rounded on their way
            parts = [
                live.transpose(0, 1).flatten() @ leaf.grad.transpose(0, 1).flatten()
                for live, leaf in zip(self._live, self._leaves, strict=True)
                if leaf.grad is not None  # there is none with a single micro-batch
            ]
        return torch.stack(parts).sum() if parts else torch.zeros((), device=self._inverse.device)


def _wide(rows: Tensor) -> Tensor:
    """At least float32, in which the gradients of all micro-batches are summed."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))
