"""Checksums of rows: how a table shows that each of them is what was written, and whose."""

import hashlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from src.errors import LutFormatError

try:  # the same checksum with the processor's carry-less multiplication: 3 us a row of 72 KiB instead of 17
    from zlib_ng.zlib_ng import crc32
except ImportError:
    from zlib import crc32


def row_checksums(first_token: int, rows: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """CRC-32 of (token id as 8 little-endian bytes, row) for consecutive ids; `rows` is (U, row_bytes)."""
    checksums = (row_checksum(first_token + offset, row) for offset, row in enumerate(rows))
    return np.fromiter(checksums, dtype=np.uint32, count=len(rows))


def row_checksum(token_id: int, row: NDArray[np.uint8]) -> int:
    """CRC-32 of one row and the id it belongs to, so that two exchanged rows are noticed too."""
    return crc32(row.data, crc32(token_id.to_bytes(8, "little")))


def check_rows(token_ids: NDArray[np.int64], rows: NDArray[np.uint8], expected: NDArray[np.uint32], where: str) -> None:
    """Raise LutFormatError naming the first id whose row (U, row_bytes) does not match its checksum (U,)."""
    for problem in damaged_rows(token_ids, rows, expected):
        raise LutFormatError(f"{where}: {problem}")


def damaged_rows(token_ids: NDArray[np.int64], rows: NDArray[np.uint8], expected: NDArray[np.uint32]) -> Iterator[str]:
    """Yield a sentence for each id whose row (U, row_bytes) does not match its checksum (U,)."""
    for token_id, row, checksum in zip(token_ids.tolist(), rows, expected.tolist(), strict=True):
        if (found := row_checksum(token_id, row)) != checksum:
            yield (
                f"the row of token id {token_id} is damaged: its CRC-32 is {found:08x}, expected {checksum:08x}; "
                "copy the table again or rebuild it with `python -m src.reparameterize`"
            )


def sha256(data: bytes) -> str:
    """SHA-256 as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()
