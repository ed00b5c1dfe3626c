"""`manifest.json`: what a table holds and which weights it came from. Written last; without it there is no table.

Its text follows from the table's sizes and a few notes, and includes a SHA-256 of them, so any changed byte is noticed.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.errors import LutError, LutFormatError
from src.lut.codecs import CODECS
from src.lut.layout import Shard, TableLayout, plan_shards, sha256, tokens_per_shard

FORMAT_VERSION, SPARSE_VERSION = 1, 2
"""Of tables with a row for each id, and of those that leave some out."""
MANIFEST_NAME = "manifest.json"
COUNTS_NAME, ROW_IDS_NAME = "token_counts.safetensors", "row_ids.safetensors"
OLD_ERRORS_NAME = "row_errors.json"
"""A file that tables of mole 0.1 have; nothing reads it."""
_SIZES = ("vocab_size", "num_layers", "num_experts", "hidden_size", "shard_bytes")
_NOTES = ("rows_from", "training_form", "backbone", "tokenizer", "token_counts_sha256")
_SPARSE_SIZES, _SPARSE_NOTES = ("sparse_rows",), ("row_ids_sha256",)
_REQUIRED = ("precision", "rows_from", "row_ids_sha256")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of `manifest.json`; all but the notes on where the rows came from follows from the layout."""

    layout: TableLayout
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
    row_ids_sha256: str | None = None
    """SHA-256 of `row_ids.safetensors`, which a sparse table has."""

    @property
    def shards(self) -> list[Shard]:
        return plan_shards(self.layout)

    @property
    def file_names(self) -> list[str]:
        """All files of the table; the manifest last, without which there is none."""
        companions = {COUNTS_NAME: self.token_counts_sha256, ROW_IDS_NAME: self.row_ids_sha256}
        present = [name for name, digest in companions.items() if digest is not None]
        return [*(shard.file_name for shard in self.shards), *present, MANIFEST_NAME]

    @property
    def text(self) -> str:
        """The content of the file."""
        values = {
            "format_version": format_version(self.layout),
            **self.layout.to_dict(),
            "row_bytes": self.layout.row_bytes,
            "shards": [
                {
                    "file": shard.file_name,
                    "first_token": shard.first_token,
                    "num_tokens": shard.num_tokens,
                    "file_bytes": shard.file_bytes(self.layout),
                    "header_sha256": sha256(shard.header(self.layout)),
                }
                for shard in self.shards
            ],
            **{name: getattr(self, name) for name in _NOTES},
            **({} if self.row_ids_sha256 is None else {"row_ids_sha256": self.row_ids_sha256}),
        }
        return json.dumps({**values, "sha256": sha256(json.dumps(values, sort_keys=True).encode())}, indent=1) + "\n"


def format_version(layout: TableLayout) -> int:
    """Return the version of the format that a table of this layout is written in."""
    return FORMAT_VERSION if layout.sparse_rows is None else SPARSE_VERSION


def read_manifest(lut_dir: Path) -> Manifest:
    """Read and check a manifest; LutError when there is no table, LutFormatError when it is damaged."""
    path = lut_dir / MANIFEST_NAME
    try:
        written = (
            path.read_bytes()
        )  # not asked for first: on a network disk an open file is up to date, its absence not
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        if not lut_dir.is_dir():
            raise LutError(f"{lut_dir}: no such table; `python -m src.reparameterize --run RUN` builds one") from None
        raise LutError(
            f"{path}: missing, so the table is unfinished; "
            "finish it with `python -m src.reparameterize --run RUN --resume`"
        ) from None
    try:
        document = json.loads(written)
    except (ValueError, RecursionError) as error:
        raise LutFormatError(f"{path}: not valid JSON ({error}); rebuild the table") from error
    if not isinstance(document, dict):
        raise LutFormatError(f"{path}: holds a {type(document).__name__}, expected an object; rebuild the table")
    if (version := _shown(document.get("format_version"))) not in (str(FORMAT_VERSION), str(SPARSE_VERSION)):
        raise LutFormatError(
            f"{path}: format_version {version}, but this version of mole reads {FORMAT_VERSION} and {SPARSE_VERSION}; "
            "use the version that wrote it, or rebuild the table"
        )
    manifest = _derive(document, path)
    if manifest is None or manifest.text.encode() != written:
        raise LutFormatError(
            f"{path}: its text does not match its sizes and its sha256, so it was edited or damaged; "
            "copy the table again or rebuild it"
        )
    return manifest


def _derive(document: dict[str, Any], path: Path) -> Manifest | None:
    """Return the manifest that a table of these sizes and notes has; None if it has another number of shards."""
    is_sparse = document["format_version"] == SPARSE_VERSION
    sizes: dict[str, Any] = {name: document.get(name) for name in (*_SIZES, *_SPARSE_SIZES * is_sparse)}
    texts: dict[str, Any] = {name: document.get(name) for name in ("precision", *_NOTES, *_SPARSE_NOTES * is_sparse)}
    for name, value in sizes.items():
        if type(value) is not int or value < 1:
            raise LutFormatError(f"{path}: {name} is {_shown(value)}, expected a positive integer; rebuild the table")
    for name, value in texts.items():
        if not isinstance(value, str) and (value is not None or name in _REQUIRED):
            raise LutFormatError(f"{path}: {name} is {_shown(value)}, expected text; rebuild the table")
    if (precision := texts.pop("precision")) not in CODECS:
        raise LutFormatError(
            f"{path}: precision {precision[:40]!r} is unknown, known are {', '.join(CODECS)}; "
            "use the version of mole that wrote it, or register its codec"
        )
    layout = TableLayout(precision=precision, **sizes)
    try:
        num_shards = -(-layout.num_rows // tokens_per_shard(layout))
    except LutError as error:  # a hidden size that the precision cannot pack
        raise LutFormatError(f"{path}: {error}") from error
    shards = document.get("shards")
    if not isinstance(shards, list) or len(shards) != num_shards:  # or damaged sizes could ask for billions of them
        return None
    return Manifest(layout=layout, **texts)


def _shown(value: object) -> str:
    """Return a value for a message, or its type where it may be long."""
    return repr(value)[:40] if isinstance(value, int | float | str) or value is None else type(value).__name__
