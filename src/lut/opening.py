"""What is checked and read when a table is opened: sizes, headers, checksums, token counts."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from src.errors import LutFormatError
from src.lut.integrity import sha256
from src.lut.layout import CHECKSUM_BYTES
from src.lut.manifest import COUNTS_NAME, Manifest, ShardRecord


def check_shard(lut_dir: Path, record: ShardRecord) -> None:
    """Raise LutFormatError when a shard is missing, resized, or has another header than the manifest says."""
    path = lut_dir / record.file
    if not path.is_file():
        raise LutFormatError(f"{path}: missing, but the manifest lists it; copy the table again or rebuild it")
    if (found := path.stat().st_size) != record.file_bytes:
        raise LutFormatError(
            f"{path}: {found:,} bytes, expected {record.file_bytes:,}; copy the table again or rebuild it"
        )
    with path.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        handle.seek(0)
        header = handle.read(min(8 + length, record.file_bytes))
    if sha256(header) != record.header_sha256:
        raise LutFormatError(f"{path}: its header is damaged or of another shard; copy the table again or rebuild it")


def read_checksums(lut_dir: Path, manifest: Manifest) -> NDArray[np.uint32]:
    """Return the CRC-32 of every row (V,), from the end of each shard."""
    checksums = np.empty(manifest.vocab_size, dtype=np.uint32)
    for record in manifest.shards:
        with (lut_dir / record.file).open("rb") as handle:
            handle.seek(record.file_bytes - CHECKSUM_BYTES * record.num_tokens)
            part = np.frombuffer(handle.read(), dtype="<u4")
        checksums[record.first_token : record.first_token + record.num_tokens] = part
    return checksums


def read_token_counts(lut_dir: Path, manifest: Manifest) -> NDArray[np.int64] | None:
    """Return how often training saw each id (V,), or None for a table that came without counts."""
    if manifest.token_counts_sha256 is None:
        return None
    path = lut_dir / COUNTS_NAME
    data = path.read_bytes() if path.is_file() else b""
    if sha256(data) != manifest.token_counts_sha256:
        raise LutFormatError(f"{path}: missing or not what the manifest lists; copy the table again or rebuild it")
    try:
        counts = load(data)["token_counts"].astype(np.int64)
    except (SafetensorError, KeyError) as error:
        raise LutFormatError(f"{path}: holds no token counts ({error}); rebuild the table") from error
    if counts.shape != (manifest.vocab_size,):
        raise LutFormatError(f"{path}: {counts.shape} counts, expected {manifest.vocab_size:,}; rebuild the table")
    return counts
