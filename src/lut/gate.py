"""Keeps files open while anybody reads from them."""

import threading
from types import TracebackType

from src.errors import LutError
from src.lut.readers.workers import after_fork_in_child


class Gate:
    """Counts who is inside; `close` lets nobody else in and waits until all have left."""

    def __init__(self, closed_message: str) -> None:
        """`closed_message` is what entering a closed gate raises as LutError."""
        self._message, self._closed = closed_message, False
        self._reset()
        after_fork_in_child(self._reset)  # threads that were inside do not exist in the child

    def _reset(self) -> None:
        self._inside, self._changed = 0, threading.Condition()

    def __enter__(self) -> None:
        """Go in, or raise LutError when closed."""
        with self._changed:
            if self._closed:
                raise LutError(self._message)
            self._inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Go out."""
        with self._changed:
            self._inside -= 1
            if self._closed:
                self._changed.notify_all()

    def close(self) -> bool:
        """Close and wait; whether this call was the one that closed it."""
        with self._changed:
            first, self._closed = not self._closed, True
            self._changed.wait_for(lambda: not self._inside)
            return first
