"""Controls: a model whose rows are wrong on purpose, to show what the table is worth.

U unique token ids, E experts, D hidden, V vocabulary.
"""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from src.model import Transformer
from src.model.experts import ExpertSource, LayerRows


class AlteredRows(nn.Module):
    """A source in place of a model's own whose rows are changed on the way."""

    def __init__(self, source: ExpertSource) -> None:
        """Alter the rows of `source`."""
        super().__init__()
        self.source = source

    def rows(self, token_ids: Tensor, token_embeddings: Tensor) -> LayerRows:
        """Return the source's rows; subclasses change them."""
        return self.source.rows(token_ids, token_embeddings)

    def prefetch(self, token_ids: Tensor) -> None:
        """Fetch nothing ahead: which ids come next is decided in `rows`."""


class ZeroedRows(AlteredRows):
    """Every row replaced by zeros: the model without its table."""

    def rows(self, token_ids: Tensor, token_embeddings: Tensor) -> LayerRows:
        """Return zeros of the right shape."""
        layer_rows = self.source.rows(token_ids, token_embeddings)
        return lambda layer: torch.zeros_like(layer_rows(layer))


class PermutedRows(AlteredRows):
    """Every id given the row of another id: the model with a table of the wrong words."""

    def __init__(self, source: ExpertSource, embedding: Tensor, seed: int = 0) -> None:
        """Draw a permutation of the ids of `embedding` (V, D)."""
        super().__init__(source)
        self.embedding = embedding
        self.permutation = torch.randperm(len(embedding), generator=torch.Generator().manual_seed(seed))

    def rows(self, token_ids: Tensor, token_embeddings: Tensor) -> LayerRows:
        """Return the rows of the permuted ids."""
        others = self.permutation.to(token_ids.device)[token_ids]
        return self.source.rows(others, self.embedding[others])


@contextmanager
def experts_replaced(model: Transformer, source: AlteredRows) -> Generator[Transformer]:
    """Lend the model another source of rows."""
    original, model.experts = model.experts, source
    try:
        yield model
    finally:
        model.experts = original
