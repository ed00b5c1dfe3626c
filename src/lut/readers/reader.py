"""What a reader is: it starts to fetch rows, and whoever needs them finishes the fetch."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Wanted = Sequence[tuple[int, int]]
"""Pairs of (token id in [0, V), row of the target that it goes to); an id may be wanted twice."""
Arrived = Callable[[int, int], None]
"""Told (token id, target row) of each row that is complete, on whichever thread completed it; may raise."""


class Fetch(Protocol):
    """Rows on their way."""

    def finish(self) -> None:
        """Return when every row has arrived; raises what reading raised. Called once."""
        ...


class Reader(Protocol):
    """Fetches rows; safe to use from several threads and after a fork."""

    def announce(self, token_id: int) -> None:
        """Take the hint that this row is asked for next, before there is memory for it; by default do nothing."""

    def start(self, wanted: Wanted, rows: Bytes, arrived: Arrived, *, background: bool) -> Fetch:
        """Begin to fill `rows` (U, row_bytes) as `wanted` says.

        With `background` the caller has other work before it calls `finish`, so the reading should go on without it.
        """
        ...

    def close(self) -> None:
        """Let go of files and threads; reading afterwards raises LutError."""
        ...


class Done:
    """A fetch that was complete when it started."""

    def finish(self) -> None:
        """Return at once."""
