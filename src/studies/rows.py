"""`results.csv`: one row for each finished cell of a study, with everything that its page needs.

Knows nothing of runs: `src.studies.measure` makes rows from them.
"""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from src.errors import RunError
from src.system.files import write_text

FREQUENCIES = (0, 1, 10, 100, 1000, 10000, 100000)
"""Smallest counts of the bands of `loss_seen_*`."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one cell measured. Losses are nats per token of the held-out text; NaN is an empty field."""

    arm: str
    seed: int
    value: str
    """Of the searched key, in cells of the search; empty in reported cells."""
    held_out_loss: float
    bits_per_byte: float
    lookup_loss: float
    """The same with rows from the table."""
    zeroed_loss: float
    """With rows replaced by zeros."""
    permuted_loss: float
    """With rows of other ids."""
    loss_seen_0: float
    """Loss over tokens whose ids occur 0 times in the training text; then 1 to 9, 10 to 99, ... times."""
    loss_seen_1: float
    loss_seen_10: float
    loss_seen_100: float
    loss_seen_1000: float
    loss_seen_10000: float
    loss_seen_100000: float
    router_entropy: float
    """Mean over the layers in the last logged step, in nats."""
    trained_parameters: int
    resident_parameters: int
    offloaded_parameters: int
    bytes_per_token: int
    """Read of what is offloaded, in the precision of the table."""
    training_flops: float
    tokens: int
    seconds: float
    """Of training, at the median speed."""
    threads: int
    corpus: str
    """Start of its fingerprint."""
    config: str
    """Start of the fingerprint of the resolved config, without names and paths."""
    commit: str
    machine: str
    curve: str
    """Validation losses as `step:loss`, separated by spaces."""
    window_losses: str
    """Loss of each held-out window, separated by spaces: what pairs two arms document by document."""
    general_loss: float = math.nan
    """Of what started from a run, on text of the kind that the run was trained on. Older results lack it and all that
    follows."""
    general_window_losses: str = ""
    loss_after_0: float = math.nan
    """Loss over the tokens that follow an id that occurs 0 times in the training text; then as for `loss_seen_0`."""
    loss_after_1: float = math.nan
    loss_after_10: float = math.nan
    loss_after_100: float = math.nan
    loss_after_1000: float = math.nan
    loss_after_10000: float = math.nan
    loss_after_100000: float = math.nan

    @property
    def key(self) -> tuple[str, int, str]:
        return self.arm, self.seed, self.value

    @property
    def windows(self) -> list[float]:
        return [float(loss) for loss in self.window_losses.split()]

    @property
    def general_windows(self) -> list[float]:
        return [float(loss) for loss in self.general_window_losses.split()]

    @property
    def curve_points(self) -> list[tuple[int, float]]:
        pairs = (point.partition(":") for point in self.curve.split())
        return [(int(step), float(loss)) for step, _, loss in pairs]


_TYPES = get_type_hints(Row)
_REQUIRED = {field.name for field in fields(Row) if field.default is MISSING}


def read_rows(path: Path) -> list[Row]:
    """Read `results.csv`; empty where there is none. RunError names a file that is none, and the line."""
    if not path.is_file():
        return []
    rows: list[Row] = []
    with path.open(newline="", encoding="utf-8") as handle:
        reader = csv.DictReader(handle)
        if missing := sorted(_REQUIRED - set(reader.fieldnames or ())):
            raise RunError(f"{path}: has no column {missing[0]}; restore the file, or remove it to start again")
        for number, line in enumerate(reader, start=2):
            try:
                rows.append(Row(**{name: _parse(line[name], kind) for name, kind in _TYPES.items() if name in line}))
            except (ValueError, TypeError, AttributeError) as error:
                raise RunError(f"{path}: line {number}: {error}; restore the file, or remove the line") from error
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write `results.csv`, whole or not at all."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    names = [field.name for field in fields(Row)]
    writer.writerow(names)
    writer.writerows([_text(getattr(row, name)) for name in names] for row in rows)
    write_text(path, text.getvalue())


def find(rows: Sequence[Row], arm: str, seed: int, value: str = "") -> Row | None:
    """Return the row of a cell."""
    return next((row for row in rows if row.key == (arm, seed, value)), None)


def _parse(text: str | None, kind: type) -> Any:
    if text is None:
        raise ValueError("has fewer fields than there are columns")
    if kind is float:
        return float(text) if text else math.nan
    return kind(text)


def _text(value: object) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else repr(value)
    return str(value)
