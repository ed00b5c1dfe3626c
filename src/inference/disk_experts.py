"""The lookup form's source of rows: a module in place of the experts that fetches what they would have computed.

U unique token ids, E experts, D hidden, L layers.
"""

import threading

import torch
from torch import Tensor, nn

from src.inference.staging import Staging
from src.lut import LutStore, RowRequest
from src.lut.readers.memory import MemoryReader
from src.lut.request import layer_decoder
from src.model.experts import LayerRows

PENDING = 2
"""Prefetches kept until their rows are asked for: a prompt's next chunk is read while this one is computed."""


class DiskExperts(nn.Module):
    """Expert rows from a `LutStore`; has no parameters and holds no table."""

    def __init__(self, store: LutStore) -> None:
        """Read from `store`, which stays the caller's to close, through `close` or by itself."""
        super().__init__()
        self.store = store
        self._lock = threading.Lock()
        self._pending: list[tuple[Tensor, RowRequest]] = []
        self._staging: Staging | None = None

    def prefetch(self, token_ids: Tensor) -> None:
        """Start reading the rows of distinct ids (U,), as soon as it is known that they come next."""
        pending = (token_ids, self._request(token_ids))
        with self._lock:
            self._pending = [*self._pending, pending][-PENDING:]

    def rows(self, token_ids: Tensor, token_embeddings: Tensor) -> LayerRows:
        """Return the rows of distinct ids (U,); the read is waited for when the first layer asks.

        Packed rows are decoded layer by layer, so that only one layer of them is ever unpacked.
        """
        request = self._prefetched(token_ids) or self._request(token_ids)
        device, layout = token_embeddings.device, self.store.layout
        arrived: list[LayerRows] = []

        def layer_rows(layer: int) -> Tensor:
            if not arrived:
                arrived.append(layer_decoder(self._delivered(request, device), layout))
            return arrived[0](layer)  # (U, E, D)

        return layer_rows

    def close(self) -> None:
        """Close the store."""
        with self._lock:
            self._pending.clear()
        self.store.close()

    def _prefetched(self, token_ids: Tensor) -> RowRequest | None:
        with self._lock:
            for index, (expected, request) in enumerate(self._pending):
                if torch.equal(expected, token_ids):
                    del self._pending[: index + 1]  # those asked for earlier were abandoned
                    return request
        return None

    def _request(self, token_ids: Tensor) -> RowRequest:
        if token_ids.device.type != "cuda" or isinstance(self.store.reader, MemoryReader):  # whose table may lie there
            return self.store.request(token_ids)
        if self._staging is None:
            self._staging = Staging(self.store.layout.row_bytes)
        return self.store.request(token_ids, out=self._staging.take(len(token_ids)))

    def _delivered(self, request: RowRequest, device: torch.device) -> Tensor:
        """Wait for the stored bytes (U, row_bytes) and bring them to `device` in one transfer."""
        codes = request.codes()
        if codes.device == device:
            return codes
        if self._staging is not None and codes.is_pinned():
            return self._staging.deliver(codes, device)
        return codes.to(device)
