"""The lookup form's source of rows: a module in place of the experts that reads what they would have computed.

U unique token ids, E experts, D hidden.
"""

import threading

import torch
from torch import Tensor, nn

from src.lut import LutStore
from src.lut.store import layer_decoder
from src.model.experts import FEW_POSITIONS, LayerRows


class Staging:
    """Buffers between disk and device: filled by a reader, copied on a stream of their own, and used again.

    A buffer is free once the event behind its copy has passed; nothing waits for the device as a whole. A buffer holds
    a power of two of rows, so that page-locked memory, which takes long to get, also serves the next prompt.
    """

    def __init__(self, row_bytes: int) -> None:
        self._row_bytes, self._lock = row_bytes, threading.Lock()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._used: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def take(self, num_rows: int, device: torch.device) -> Tensor:
        """Return a uint8 buffer of at least `num_rows` rows that no copy reads from, page-locked for CUDA."""
        with self._lock:
            for index, (buffer, copied) in enumerate(self._used):
                if len(buffer) >= num_rows and (copied is None or copied.query()):
                    return self._used.pop(index)[0]
            self._used = [(buffer, copied) for buffer, copied in self._used if copied and not copied.query()]
        if device.type != "cuda":
            return torch.empty(num_rows, self._row_bytes, dtype=torch.uint8)
        rows = 1 << (num_rows - 1).bit_length()
        with torch.cuda.stream(self._stream(device)):  # or the memory would be got through GPU 0, and start it
            return torch.empty(rows, self._row_bytes, dtype=torch.uint8, pin_memory=True)

    def deliver(self, buffer: Tensor, num_rows: int, device: torch.device) -> Tensor:
        """Copy the first rows of `buffer` to `device` and take the buffer back.

        What is queued on the device afterwards sees the copy complete.
        """
        codes, copied = buffer[:num_rows], None
        if device.type == "cuda":
            with torch.cuda.stream(stream := self._stream(device)):
                on_device = codes.to(device, non_blocking=True)
                copied = torch.cuda.Event()
                copied.record(stream)
            current = torch.cuda.current_stream(device)
            current.wait_event(copied)
            on_device.record_stream(current)  # its memory may be reused only when this stream is done with it
        else:
            on_device = codes.to(device, copy=True)
        with self._lock:
            self._used.append((buffer, copied))
        return on_device

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        with self._lock:
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)
            return self._streams[device]


class DiskExperts(nn.Module):
    """Expert rows from a `LutStore`, which `close` closes; has no parameters and holds no table."""

    def __init__(self, store: LutStore) -> None:
        super().__init__()
        self.store, self._staging = store, Staging(store.layout.row_bytes)

    def rows(self, token_ids: Tensor, token_embeddings: Tensor) -> LayerRows:
        """Start reading the rows of ids (U,) for the embeddings' device; the first layer asked for waits for the disk.

        A few ids that repeat are read once. Packed rows are decoded layer by layer, so that only one layer of them is
        ever unpacked.
        """
        device, positions = token_embeddings.device, None
        if 1 < len(token_ids) <= FEW_POSITIONS:
            distinct, inverse = token_ids.unique(return_inverse=True)
            if len(distinct) < len(token_ids):
                token_ids, positions = distinct, inverse.to(device, non_blocking=True)
        if device == self.store.device:
            request, buffer = self.store.request(token_ids), None
            if positions is None:
                return request.layer
        else:
            buffer = self._staging.take(len(token_ids), device)
            request = self.store.request(token_ids, out=buffer[: len(token_ids)])
        decoders: list[LayerRows] = []

        def layer_rows(layer: int) -> Tensor:
            if not decoders:
                codes = request.codes()  # (U, row_bytes)
                if buffer is not None:
                    codes = self._staging.deliver(buffer, len(token_ids), device)
                codes = codes if positions is None else codes.index_select(0, positions)
                decoders.append(layer_decoder(codes, self.store.layout))
            return decoders[0](layer)  # (U, E, D)

        return layer_rows

    def close(self) -> None:
        self.store.close()
