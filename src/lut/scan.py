"""Sequential reads of whole tables in runs of checked rows, and the checks made when a table is opened.

Knows nothing of random access, caches or threads; `LutStore` does.

U token ids in a run.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from src.errors import LutFormatError
from src.lut.layout import (
    CHECKSUM_BYTES,
    Shard,
    TableLayout,
    check_rows,
    damaged_rows,
    plan_shards,
    sha256,
    tokens_per_shard,
)
from src.lut.manifest import COUNTS_NAME, ROW_IDS_NAME, Manifest


class TableScan:
    """Rows of consecutive ids, straight from the shards; the caller has read the manifest."""

    def __init__(self, lut_dir: Path, layout: TableLayout) -> None:
        self._lut_dir, self.layout = lut_dir, layout
        self._shards = plan_shards(layout)

    def read(self, first_token: int, num_tokens: int) -> NDArray[np.uint8]:
        """Return rows (num_tokens, row_bytes) of consecutive ids; LutFormatError names the first damaged one."""
        rows, checksums = self._read(first_token, num_tokens)
        check_rows(np.arange(first_token, first_token + num_tokens), rows, checksums, self.layout, str(self._lut_dir))
        return rows

    def damaged(self, first_token: int, num_tokens: int) -> list[str]:
        """Return a sentence for each of some consecutive ids whose row does not match its checksum."""
        rows, checksums = self._read(first_token, num_tokens)
        return list(damaged_rows(np.arange(first_token, first_token + num_tokens), rows, checksums, self.layout))

    def _read(self, first_token: int, num_tokens: int) -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
        rows = np.empty((num_tokens, self.layout.row_bytes), dtype=np.uint8)
        checksums = np.empty(num_tokens, dtype="<u4")
        done = 0
        while done < num_tokens:
            shard = self._shards[(first_token + done) // tokens_per_shard(self.layout)]
            row = first_token + done - shard.first_token
            count = min(num_tokens - done, shard.num_tokens - row)
            self._read_shard(shard, row, rows[done : done + count], checksums[done : done + count])
            done += count
        return rows, checksums

    def _read_shard(self, shard: Shard, row: int, rows: NDArray[np.uint8], checksums: NDArray[np.uint32]) -> None:
        layout, path = self.layout, self._lut_dir / shard.file_name
        rows_at = shard.rows_offset(layout) + row * layout.row_bytes
        checksums_at = shard.checksums_offset(layout) + row * CHECKSUM_BYTES
        with path.open("rb") as file:
            for target, offset in ((rows.data, rows_at), (checksums.data, checksums_at)):
                file.seek(offset)
                if (count := file.readinto(target)) < target.nbytes:
                    raise LutFormatError(
                        f"{path}: ends at byte {offset + count:,}, inside its rows; copy the table again or rebuild it"
                    )


def check_shard(lut_dir: Path, shard: Shard, layout: TableLayout) -> None:
    """Raise LutFormatError when a shard is missing, resized, or has another header than the layout gives it."""
    path, expected = lut_dir / shard.file_name, shard.file_bytes(layout)
    if not path.is_file():
        raise LutFormatError(f"{path}: missing, but the manifest lists it; copy the table again or rebuild it")
    if (found := path.stat().st_size) != expected:
        raise LutFormatError(f"{path}: {found:,} bytes, expected {expected:,}; copy the table again or rebuild it")
    header = shard.header(layout)
    with path.open("rb") as handle:
        if handle.read(len(header)) != header:
            raise LutFormatError(
                f"{path}: its header is damaged or of another shard; copy the table again or rebuild it"
            )


def read_checksums(lut_dir: Path, layout: TableLayout) -> NDArray[np.uint32]:
    """Return the CRC-32 of every row (V,), from the end of each shard."""
    parts = [
        np.fromfile(lut_dir / shard.file_name, "<u4", offset=shard.checksums_offset(layout))
        for shard in plan_shards(layout)
    ]
    return np.concatenate(parts).astype(np.uint32, copy=False)


def read_token_counts(lut_dir: Path, manifest: Manifest) -> NDArray[np.int64] | None:
    """Return how often training saw each id (V,), or None for a table that came without counts."""
    if manifest.token_counts_sha256 is None:
        return None
    vocab_size, digest = manifest.layout.vocab_size, manifest.token_counts_sha256
    return _read_companion(lut_dir / COUNTS_NAME, digest, "token counts", vocab_size)


def read_row_ids(lut_dir: Path, manifest: Manifest) -> NDArray[np.int64] | None:
    """Return the ids that have a row (R,), in the order of the rows, or None for a table that has all."""
    if manifest.row_ids_sha256 is None:
        return None
    path, layout = lut_dir / ROW_IDS_NAME, manifest.layout
    row_ids = _read_companion(path, manifest.row_ids_sha256, "row ids", layout.num_rows)
    if not (np.diff(row_ids, prepend=-1, append=layout.vocab_size) > 0).all():
        raise LutFormatError(
            f"{path}: its ids are not in ascending order within [0, {layout.vocab_size}); rebuild the table"
        )
    return row_ids


def row_numbers(row_ids: NDArray[np.int64], token_ids: Sequence[int]) -> list[int]:
    """Return the numbers of the rows of ids, found by search in `row_ids` (R,); R for an id that has none."""
    numbers = np.searchsorted(row_ids, token_ids)
    found = row_ids.take(numbers, mode="clip") == token_ids
    return np.where(found, numbers, len(row_ids)).tolist()


def _read_companion(path: Path, digest: str, what: str, count: int) -> NDArray[np.int64]:
    data = path.read_bytes() if path.is_file() else b""
    if sha256(data) != digest:
        raise LutFormatError(f"{path}: missing or not what the manifest lists; copy the table again or rebuild it")
    try:
        values = load(data)[what.replace(" ", "_")].astype(np.int64)
    except (SafetensorError, KeyError) as error:
        raise LutFormatError(f"{path}: holds no {what} ({error}); rebuild the table") from error
    if values.shape != (count,):
        raise LutFormatError(f"{path}: {values.shape} {what}, expected {count:,}; rebuild the table")
    return values
