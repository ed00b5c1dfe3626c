"""The lookup form's source of rows: a module in place of the experts that fetches what they would have computed.

U unique token ids, E experts, D hidden, L layers.
"""

import torch
from torch import Tensor, nn

from src.lut import LutStore, RowRequest
from src.model.experts import LayerRows


class DiskExperts(nn.Module):
    """Expert rows from a `LutStore`; has no parameters and holds no table."""

    def __init__(self, store: LutStore) -> None:
        """Read from `store`, which stays the caller's to close, through `close` or by itself."""
        super().__init__()
        self.store = store
        self._prefetched: tuple[Tensor, RowRequest] | None = None

    def prefetch(self, token_ids: Tensor) -> None:
        """Start reading the rows of distinct ids (U,), as soon as it is known that they come next."""
        self._prefetched = (token_ids, self.store.request(token_ids))

    def rows(self, token_ids: Tensor, token_embeddings: Tensor) -> LayerRows:
        """Return the rows of distinct ids (U,); the read is waited for when the first layer asks."""
        prefetched, self._prefetched = self._prefetched, None
        if prefetched is not None and torch.equal(prefetched[0], token_ids):
            request = prefetched[1]
        else:
            request = self.store.request(token_ids)
        arrived: list[Tensor] = []

        def layer_rows(layer: int) -> Tensor:
            if not arrived:
                arrived.append(request.wait())  # (U, L, E, D)
            return arrived[0][:, layer].to(token_embeddings.device)  # (U, E, D)

        return layer_rows

    def close(self) -> None:
        """Close the store."""
        self.store.close()
