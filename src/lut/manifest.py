"""`manifest.json`: what a table holds and which weights it came from. Written last; without it there is no table."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from src.errors import LutError, LutFormatError
from src.files import write_text
from src.lut.integrity import seal, sha256
from src.lut.layout import Shard, TableLayout, plan_shards
from src.lut.quantization import CODECS

FORMAT_VERSION = 0
MANIFEST_NAME = "manifest.json"


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
    row_bytes: int
    shards: tuple[ShardRecord, ...]
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
        )

    def write(self, lut_dir: Path) -> None:
        """Write it, sealed, whole or not at all."""
        write_text(lut_dir / MANIFEST_NAME, json.dumps(seal(asdict(self)), indent=1) + "\n")


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
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LutFormatError(f"{path}: not valid JSON ({error}); rebuild the table") from error
    if not isinstance(document, dict):
        raise LutFormatError(f"{path}: holds a {type(document).__name__}, expected an object; rebuild the table")
    version = document.get("format_version")
    if version != FORMAT_VERSION:
        raise LutFormatError(
            f"{path}: format_version {version!r}, but this version of mole reads {FORMAT_VERSION}; "
            "use the version that wrote it, or rebuild the table"
        )
    if document.get("sha256") != seal(document)["sha256"]:
        raise LutFormatError(f"{path}: its text does not match its own sha256, so it was edited; rebuild the table")
    return _parse(document, path)


def _parse(document: dict[str, object], path: Path) -> Manifest:
    try:
        values = {key: value for key, value in document.items() if key != "sha256"}
        shards = tuple(ShardRecord(**record) for record in values.pop("shards"))  # type: ignore[union-attr]
        manifest = Manifest(**values, shards=shards)  # type: ignore[arg-type]
    except (TypeError, KeyError, AttributeError) as error:
        raise LutFormatError(f"{path}: fields are missing or unknown ({error}); rebuild the table") from error
    if manifest.precision not in CODECS:
        raise LutFormatError(
            f"{path}: precision {manifest.precision!r} is unknown; use the version of mole that wrote it"
        )
    layout = manifest.layout
    expected = tuple(shard_record(shard, layout) for shard in plan_shards(layout))
    if manifest.row_bytes != layout.row_bytes or manifest.shards != expected:
        raise LutFormatError(f"{path}: its shards do not follow from its sizes; rebuild the table")
    return manifest
