"""`manifest.json`: what a table holds and which weights it came from. Written last; without it there is no table.

Its text is a function of its values, and is sealed by its own SHA-256: any byte that was changed is noticed.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from src.errors import LutError, LutFormatError
from src.files import write_text
from src.lut.document import integer, optional_text, read_document, require_seal, sealed_text, text
from src.lut.integrity import sha256
from src.lut.layout import Shard, TableLayout, plan_shards, tokens_per_shard
from src.lut.quantization import CODECS

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
COUNTS_NAME = "token_counts.safetensors"
MAX_SIZE = 2**31
"""No size of a table reaches this; larger numbers in a manifest are damage."""


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

    def write(self, lut_dir: Path) -> None:
        """Write it, sealed, whole or not at all."""
        write_text(lut_dir / MANIFEST_NAME, sealed_text(asdict(self)))


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
    """Read every field with its type; a sealed manifest can still be somebody else's idea of one."""
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
            f"{path}: precision {manifest.precision[:40]!r} is unknown; use the version of mole that wrote it"
        )
    layout = manifest.layout
    try:
        row_bytes = layout.row_bytes
    except LutError as error:  # a hidden size that the precision cannot pack
        raise LutFormatError(f"{path}: {error}") from error
    fits = manifest.row_bytes == row_bytes
    # Count before listing: sizes that are damage would make a list without end.
    fits = fits and len(manifest.shards) == -(-layout.vocab_size // tokens_per_shard(layout))
    if not fits or manifest.shards != tuple(shard_record(shard, layout) for shard in plan_shards(layout)):
        raise LutFormatError(f"{path}: its shards do not follow from its sizes; rebuild the table")
