"""Page-locked memory between a reader and a CUDA device: one transfer per step, on a stream of its own.

U unique token ids.
"""

import threading

import torch
from torch import Tensor


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
