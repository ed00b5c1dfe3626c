"""The lookup form's source of rows: a module in place of the experts that fetches what they would have computed.

U unique token ids, E experts, D hidden, L layers.

Page-locked memory between a reader and a CUDA device: one transfer per step, on a stream of its own.

U unique token ids.
"""

import threading

import torch
from torch import Tensor, nn

from src.lut import LutStore, RowRequest
from src.lut.readers.memory import MemoryReader
from src.lut.store import layer_decoder
from src.model.experts import LayerRows


class Staging:
    """Pinned buffers that are filled from disk, copied to the device beside its computation, and used again.

    A buffer is free again when the event behind its copy has passed; nothing waits for the device as a whole.
    """

    def __init__(self, row_bytes: int) -> None:
        """Allocate nothing yet."""
        self._row_bytes = row_bytes
        self._lock = threading.Lock()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._copied: list[tuple[Tensor, torch.cuda.Event]] = []

    def take(self, num_rows: int) -> Tensor:
        """Return a pinned (num_rows, row_bytes) uint8 buffer that no copy is reading from."""
        with self._lock:
            for index, (buffer, copied) in enumerate(self._copied):
                if len(buffer) >= num_rows and copied.query():
                    del self._copied[index]
                    return buffer[:num_rows]
            self._copied = [(buffer, copied) for buffer, copied in self._copied if not copied.query()]
        return torch.empty(num_rows, self._row_bytes, dtype=torch.uint8, pin_memory=True)

    def deliver(self, codes: Tensor, device: torch.device) -> Tensor:
        """Copy pinned `codes` (U, row_bytes) to `device`; what is queued there afterwards sees them complete."""
        with self._lock:
            stream = self._streams.setdefault(device, torch.cuda.Stream(device))
        with torch.cuda.stream(stream):
            on_device = codes.to(device, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(stream)
        current = torch.cuda.current_stream(device)
        current.wait_event(copied)
        on_device.record_stream(current)  # its memory may be given away only when this stream is done with it
        with self._lock:
            self._copied.append((codes, copied))
        return on_device


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
