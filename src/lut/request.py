"""Rows that were asked for: wait for them as late as possible, decode them a layer at a time.

U token ids, L layers, E experts, D hidden.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from src.lut.layout import TableLayout
from src.lut.quantization import FloatCodec, codec


@dataclass
class ReadStats:
    """What a store has done since it was opened; a consistent copy, not a live view."""

    requests: int = 0
    rows: int = 0
    """Rows asked for."""
    bytes: int = 0
    """Bytes of rows that the reader fetched: those of the row cache are not among them."""
    cache_hits: int = 0
    cache_misses: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of rows that the row cache held; 0 without one."""
        return self.cache_hits / max(1, self.cache_hits + self.cache_misses)


class RowRequest:
    """Rows on their way. Every method waits; waiting twice costs nothing, and raises again what the read raised."""

    def __init__(self, layout: TableLayout, codes: Tensor, finish: Callable[[], None] | None) -> None:
        """`codes` (U, row_bytes) are complete once `finish` returns; None says that they are."""
        self._layout, self._codes, self._finish = layout, codes, finish
        self._lock = threading.Lock()
        self._error: BaseException | None = None

    def codes(self) -> Tensor:
        """Return the stored bytes (U, row_bytes) uint8, checked."""
        with self._lock:
            if self._error is not None:
                raise self._error
            if self._finish is not None:
                finish, self._finish = self._finish, None
                try:
                    finish()
                except BaseException as error:
                    self._error = error
                    raise
        return self._codes

    def wait(self) -> Tensor:
        """Return the rows (U, L, E, D) in the codec's dtype."""
        return decode(self.codes(), self._layout)

    def layer(self, layer: int) -> Tensor:
        """Return one layer's rows (U, E, D), decoding no other: packed rows stay packed until they are used."""
        return layer_decoder(self.codes(), self._layout)(layer)


def decode(codes: Tensor, layout: TableLayout) -> Tensor:
    """Turn stored bytes (U, row_bytes) into rows (U, L, E, D)."""
    return codec(layout.precision).decode(_vectors(codes, layout), layout.hidden_size)


def decodes_to_view(layout: TableLayout) -> bool:
    """Whether decoded rows are the stored bytes themselves, so that a view of them may be made before they arrive."""
    return isinstance(codec(layout.precision), FloatCodec)


def layer_decoder(codes: Tensor, layout: TableLayout) -> Callable[[int], Tensor]:
    """Return what turns one layer of stored bytes (U, row_bytes) into rows (U, E, D); packed ones as it is called."""
    row_codec, vectors = codec(layout.precision), _vectors(codes, layout)
    if decodes_to_view(layout):  # so one serves all layers
        return row_codec.decode(vectors, layout.hidden_size).unbind(1).__getitem__
    return lambda layer: row_codec.decode(vectors[:, layer], layout.hidden_size)


def _vectors(codes: Tensor, layout: TableLayout) -> Tensor:
    return codes.view(-1, layout.num_layers, layout.num_experts, layout.vector_bytes)
