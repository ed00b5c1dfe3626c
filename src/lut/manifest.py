"""The JSON documents of a table: `manifest.json` and `row_errors.json`, written once and strictly validated on read.

The manifest says what a table holds and which weights it came from; without it there is no table. The text of a
document is a function of its values and holds its own SHA-256, so any changed byte is detected. `row_errors.json` says
how far stored rows are from computed rows, by layer. Its sums are added in an order that the plan alone decides, so
that ranks and interruptions change nothing.

L layers, E experts, D hidden, U tokens.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from src.errors import LutError, LutFormatError
from src.lut.codecs import CODECS
from src.lut.layout import Shard, TableLayout, plan_shards, sha256, tokens_per_shard
from src.system.files import write_text

MAX_BYTES = 64 * 2**20
"""No document of a table is larger; a larger file is not read."""


def sealed_text(values: Mapping[str, object]) -> str:
    """Return the text of a document with these values, which includes the SHA-256 of its canonical form."""
    body = {key: value for key, value in values.items() if key != "sha256"}
    seal = sha256(json.dumps(body, sort_keys=True).encode())
    return json.dumps({**body, "sha256": seal}, indent=1) + "\n"


def read_document(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return a JSON object and the bytes it was read from; LutFormatError names the file otherwise."""
    if (size := path.stat().st_size) > MAX_BYTES:
        raise LutFormatError(f"{path}: {size:,} bytes, but it never has more than {MAX_BYTES:,}; rebuild the table")
    written = path.read_bytes()
    try:
        document = json.loads(written.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise LutFormatError(f"{path}: not valid JSON ({error}); rebuild the table") from error
    if not isinstance(document, dict):
        raise LutFormatError(f"{path}: holds a {type(document).__name__}, expected an object; rebuild the table")
    return document, written


def require_seal(document: Mapping[str, object], written: bytes, path: Path) -> None:
    """Raise LutFormatError unless the bytes are exactly what a writer makes of these values."""
    try:
        expected = sealed_text(document).encode()
    except RecursionError as error:
        raise LutFormatError(f"{path}: is nested too deeply to be a manifest; rebuild the table") from error
    if written != expected:
        raise LutFormatError(f"{path}: its text does not match its own sha256, so it was edited; rebuild the table")


def integer(values: Mapping[str, object], key: str, path: Path, lowest: int, highest: int) -> int:
    """Return an integer in [lowest, highest]; LutFormatError names file, field and what was found."""
    value = values[key]
    if type(value) is not int or not lowest <= value <= highest:
        raise LutFormatError(f"{path}: {key} is {_shown(value)}, expected an integer in [{lowest}, {highest}]")
    return value


def text(values: Mapping[str, object], key: str, path: Path) -> str:
    """Return a string; LutFormatError names file, field and what was found."""
    value = values[key]
    if not isinstance(value, str):
        raise LutFormatError(f"{path}: {key} is {_shown(value)}, expected text; rebuild the table")
    return value


def optional_text(values: Mapping[str, object], key: str, path: Path) -> str | None:
    """Return a string or None."""
    return None if values[key] is None else text(values, key, path)


def _shown(value: object) -> str:
    """Show a value of any size in a message."""
    if isinstance(value, int) and abs(value) >= 2**64:
        return "a number of more than 64 bits"
    return repr(value)[:40] if isinstance(value, (int, float, str, bool)) or value is None else type(value).__name__


FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
COUNTS_NAME = "token_counts.safetensors"
MAX_SIZE = 2**31
"""Sizes in a manifest are smaller than this; larger numbers mean damage."""


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One shard as the manifest describes it."""

    file: str
    first_token: int
    num_tokens: int
    file_bytes: int
    header_sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of `manifest.json`."""

    format_version: int
    vocab_size: int
    num_layers: int
    num_experts: int
    hidden_size: int
    precision: str
    shard_bytes: int
    """What the rows of a shard fit in; decides, with the sizes, how the table is cut."""
    row_bytes: int
    shards: tuple[ShardRecord, ...]
    rows_from: str
    """What the rows were made by, such as `experts in float32` or `table in float32`."""
    training_form: str | None
    """Identity of the weights that the rows were computed from; None for an imported table."""
    backbone: str | None
    """Identity of the backbone that this table belongs to."""
    tokenizer: str | None
    """Fingerprint of the tokenizer whose ids the rows are for; None when it was not known."""
    token_counts_sha256: str | None
    """SHA-256 of `token_counts.safetensors`, if the table came with counts."""

    @property
    def layout(self) -> TableLayout:
        """The table's shape."""
        return TableLayout(
            vocab_size=self.vocab_size,
            num_layers=self.num_layers,
            num_experts=self.num_experts,
            hidden_size=self.hidden_size,
            precision=self.precision,
            shard_bytes=self.shard_bytes,
        )

    @property
    def text(self) -> str:
        """The content of the file, sealed by its own SHA-256."""
        return sealed_text(asdict(self))


def shard_record(shard: Shard, layout: TableLayout) -> ShardRecord:
    """Describe a shard; everything but its rows follows from the layout."""
    return ShardRecord(
        file=shard.file_name,
        first_token=shard.first_token,
        num_tokens=shard.num_tokens,
        file_bytes=shard.file_bytes(layout),
        header_sha256=sha256(shard.header(layout)),
    )


def read_manifest(lut_dir: Path) -> Manifest:
    """Read and check a manifest; LutError when there is no table, LutFormatError when it cannot be trusted."""
    path = lut_dir / MANIFEST_NAME
    if not lut_dir.is_dir():
        raise LutError(f"{lut_dir}: no such table; `python -m src.reparameterize --run RUN` builds one")
    if not path.is_file():
        raise LutError(
            f"{path}: missing, so the table is unfinished; "
            "finish it with `python -m src.reparameterize --run RUN --resume`"
        )
    document, written = read_document(path)
    version = document.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise LutFormatError(
            f"{path}: format_version {str(version)[:40]}, but this version of mole reads {FORMAT_VERSION}; "
            "use the version that wrote it, or rebuild the table"
        )
    require_seal(document, written, path)
    manifest = _parse(document, path)
    _require_shards_of_sizes(manifest, path)
    return manifest


def _parse(document: Mapping[str, Any], path: Path) -> Manifest:
    """Read every field with its type; a matching checksum does not prove that the fields are valid."""
    known = {*Manifest.__dataclass_fields__, "sha256"}
    if found := sorted(known.symmetric_difference(document)):
        raise LutFormatError(f"{path}: field {found[0][:40]!r} is missing or unknown; rebuild the table")
    records = document["shards"]
    if not isinstance(records, list):
        raise LutFormatError(f"{path}: shards is a {type(records).__name__}, expected a list; rebuild the table")
    return Manifest(
        format_version=integer(document, "format_version", path, 0, MAX_SIZE),
        vocab_size=integer(document, "vocab_size", path, 1, MAX_SIZE),
        num_layers=integer(document, "num_layers", path, 1, MAX_SIZE),
        num_experts=integer(document, "num_experts", path, 1, MAX_SIZE),
        hidden_size=integer(document, "hidden_size", path, 1, MAX_SIZE),
        precision=text(document, "precision", path),
        shard_bytes=integer(document, "shard_bytes", path, 1, MAX_SIZE**2),
        row_bytes=integer(document, "row_bytes", path, 1, MAX_SIZE**2),
        shards=tuple(_parse_record(record, path) for record in records),
        rows_from=text(document, "rows_from", path),
        training_form=optional_text(document, "training_form", path),
        backbone=optional_text(document, "backbone", path),
        tokenizer=optional_text(document, "tokenizer", path),
        token_counts_sha256=optional_text(document, "token_counts_sha256", path),
    )


def _parse_record(record: object, path: Path) -> ShardRecord:
    if not isinstance(record, dict) or set(record) != set(ShardRecord.__dataclass_fields__):
        raise LutFormatError(f"{path}: an entry of shards has other fields than a shard; rebuild the table")
    return ShardRecord(
        file=text(record, "file", path),
        first_token=integer(record, "first_token", path, 0, MAX_SIZE),
        num_tokens=integer(record, "num_tokens", path, 1, MAX_SIZE),
        file_bytes=integer(record, "file_bytes", path, 1, MAX_SIZE**2),
        header_sha256=text(record, "header_sha256", path),
    )


def _require_shards_of_sizes(manifest: Manifest, path: Path) -> None:
    if manifest.precision not in CODECS:
        raise LutFormatError(
            f"{path}: precision {manifest.precision[:40]!r} is unknown, known are {', '.join(CODECS)}; "
            "use the version of mole that wrote it, or register its codec"
        )
    layout = manifest.layout
    try:
        row_bytes = layout.row_bytes
    except LutError as error:  # a hidden size that the precision cannot pack
        raise LutFormatError(f"{path}: {error}") from error
    fits = manifest.row_bytes == row_bytes
    # Check the count first: corrupt sizes could make `plan_shards` allocate without bound.
    fits = fits and len(manifest.shards) == -(-layout.vocab_size // tokens_per_shard(layout))
    if not fits or manifest.shards != tuple(shard_record(shard, layout) for shard in plan_shards(layout)):
        raise LutFormatError(f"{path}: its shards do not follow from its sizes; rebuild the table")


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
    """Return the sums (3,) float64 of one layer: wanted (U, E, D) float32, stored in the codec's dtype."""
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
        return _parse_row_errors(document["table"]), [_parse_row_errors(layer) for layer in document["layers"]]
    except (TypeError, KeyError, ValueError) as error:
        raise LutFormatError(f"{path}: fields are missing or unknown ({error}); rebuild the table") from error


def _parse_row_errors(values: Any) -> RowErrors:
    return RowErrors(**{name: float(value) for name, value in values.items()})


def _errors(sums: LayerSums, num_values: int) -> RowErrors:
    rms, size = math.sqrt(sums.squared_error / num_values), math.sqrt(sums.squared / num_values)
    relative = rms / size if size else 0.0
    return RowErrors(*(float(f"{value:.6g}") for value in (sums.max_abs, rms, relative)))
