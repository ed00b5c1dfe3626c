"""How far the stored rows lie from the rows that were to be stored, layer by layer.

The sums are kept chunk by chunk in an order that the plan alone decides, so that ranks and interruptions change
nothing; what is published beside the manifest has six digits.

L layers, E experts, D hidden, U tokens.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from src.errors import LutFormatError
from src.files import write_text
from src.lut.document import read_document, require_seal, sealed_text

ERRORS_NAME = "row_errors.json"


class LayerSums(NamedTuple):
    """What is summed over the values of one layer."""

    max_abs: float
    squared_error: float
    squared: float


@dataclass(frozen=True)
class RowErrors:
    """The error of one layer's rows, or of the whole table's."""

    max_abs: float
    """Largest |stored - wanted|."""
    rms: float
    """Root of the mean squared error."""
    relative_rms: float
    """`rms` over the root mean square of the wanted rows; 0 where those are all zero."""


def measure(wanted: Tensor, stored: Tensor) -> Tensor:
    """Return the sums (3,) float64 of one layer: wanted (U, E, D) float32, stored in what the codec decodes to."""
    error = stored.to(wanted.dtype) - wanted
    squared_error = error.square().sum(dtype=torch.float64)
    return torch.stack([error.abs().amax().double(), squared_error, wanted.square().sum(dtype=torch.float64)])


def combine(measured: Sequence[Tensor]) -> Tensor:
    """Return the sums (3,) of several parts of a layer, each (3,)."""
    parts = torch.stack(list(measured))  # (parts, 3)
    return torch.cat([parts[:, :1].amax(dim=0), parts[:, 1:].sum(dim=0)])


def add(total: LayerSums, more: LayerSums) -> LayerSums:
    """Return the sums of two parts of a layer."""
    return LayerSums(
        max(total.max_abs, more.max_abs), total.squared_error + more.squared_error, total.squared + more.squared
    )


def write_row_errors(lut_dir: Path, shards: Iterable[Sequence[LayerSums]], layer_values: int, rows_from: str) -> None:
    """Write `row_errors.json` from the sums of every shard (L each); a layer of the table has `layer_values` values."""
    zero = LayerSums(0.0, 0.0, 0.0)
    layers: list[LayerSums] = []
    for shard in shards:
        layers = [add(total, more) for total, more in zip(layers or [zero] * len(shard), shard, strict=True)]
    table = zero
    for layer in layers:
        table = add(table, layer)
    document = {
        "compared_with": rows_from,
        "table": asdict(_errors(table, layer_values * len(layers))),
        "layers": [asdict(_errors(layer, layer_values)) for layer in layers],
    }
    write_text(lut_dir / ERRORS_NAME, sealed_text(document))


def read_row_errors(lut_dir: Path) -> tuple[RowErrors, list[RowErrors]]:
    """Return the errors of the table and of each layer; LutFormatError when the file was changed."""
    path = lut_dir / ERRORS_NAME
    if not path.is_file():
        raise LutFormatError(f"{path}: missing; copy the table again or rebuild it")
    document, written = read_document(path)
    require_seal(document, written, path)
    try:
        return _parse(document["table"]), [_parse(layer) for layer in document["layers"]]
    except (TypeError, KeyError, ValueError) as error:
        raise LutFormatError(f"{path}: fields are missing or unknown ({error}); rebuild the table") from error


def _parse(values: Any) -> RowErrors:
    return RowErrors(**{name: float(value) for name, value in values.items()})


def _errors(sums: LayerSums, num_values: int) -> RowErrors:
    rms, size = math.sqrt(sums.squared_error / num_values), math.sqrt(sums.squared / num_values)
    relative = rms / size if size else 0.0
    return RowErrors(*(float(f"{value:.6g}") for value in (sums.max_abs, rms, relative)))
