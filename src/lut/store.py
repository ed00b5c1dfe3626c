"""`LutStore`: a table on disk, opened, checked, and asked for rows by token id.

U token ids, L layers, E experts, D hidden.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from src.errors import LutError, LutFormatError
from src.lut.integrity import check_rows, sha256
from src.lut.layout import plan_shards
from src.lut.manifest import Manifest, ShardRecord, read_manifest
from src.lut.quantization import codec
from src.lut.readers import READERS


@dataclass
class ReadStats:
    """What a store has done since it was opened."""

    requests: int = 0
    rows: int = 0
    bytes: int = 0


class RowRequest:
    """Rows on their way; `wait` once, as late as possible."""

    def __init__(self, store: "LutStore", future: "Future[Tensor]") -> None:
        """Wrap the read that is under way."""
        self._store, self._future = store, future

    def wait(self) -> Tensor:
        """Return the rows (U, L, E, D) in the codec's dtype, checked; raises what the read raised."""
        return self._store.decode(self._future.result())


class LutStore:
    """A finished table. Thread-safe; close it or use it as a context manager."""

    def __init__(self, lut_dir: Path, manifest: Manifest, *, reader: str, verify_rows: bool) -> None:
        """Use `LutStore.open`, which checks the directory first."""
        self.lut_dir, self.manifest, self.layout = lut_dir, manifest, manifest.layout
        self.stats = ReadStats()
        self._codec = codec(manifest.precision)
        self._verify_rows = verify_rows
        self._checksums = np.concatenate([_read_checksums(lut_dir, record) for record in manifest.shards])
        self._reader = READERS[reader](lut_dir, self.layout, plan_shards(self.layout))
        self._executor: ThreadPoolExecutor | None = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lut")

    @classmethod
    def open(cls, lut_dir: Path | str, *, reader: str = "auto", verify_rows: bool = True) -> "LutStore":
        """Open the table in `lut_dir`.

        Args:
            lut_dir: a directory with a manifest.
            reader: `auto` or a name of `src.lut.readers.READERS`.
            verify_rows: check the CRC-32 of every row that is read.

        Raises:
            LutError: there is no finished table here, or the reader is unknown.
            LutFormatError: files are missing, resized or damaged.
        """
        lut_dir = Path(lut_dir)
        if reader != "auto" and reader not in READERS:
            raise LutError(f"reader {reader!r} is unknown; choose auto or one of {', '.join(READERS)}")
        manifest = read_manifest(lut_dir)
        for record in manifest.shards:
            _check_shard(lut_dir, record)
        return cls(lut_dir, manifest, reader="pread" if reader == "auto" else reader, verify_rows=verify_rows)

    def request(self, token_ids: Tensor, out: Tensor | None = None) -> RowRequest:
        """Start reading the rows of `token_ids` (U,) int64 and return at once.

        `out` is an optional (U, row_bytes) uint8 buffer to read into. IndexError names an id outside [0, V).
        """
        if self._executor is None:
            raise LutError(f"{self.lut_dir}: the store is closed; open it again to read")
        ids = token_ids.detach().cpu().numpy()
        if ids.ndim != 1 or ids.dtype != np.int64:
            raise ValueError(f"token_ids must be one-dimensional int64, found shape {ids.shape} and {ids.dtype}")
        if ids.size and (ids.min() < 0 or ids.max() >= self.manifest.vocab_size):
            bad = next(token_id for token_id in ids.tolist() if not 0 <= token_id < self.manifest.vocab_size)
            raise IndexError(f"token id {bad} is outside the table's vocabulary [0, {self.manifest.vocab_size})")
        buffer = torch.empty(len(ids), self.layout.row_bytes, dtype=torch.uint8) if out is None else out
        self.stats.requests += 1
        self.stats.rows += len(ids)
        self.stats.bytes += len(ids) * self.layout.row_bytes
        return RowRequest(self, self._executor.submit(self._read, ids, buffer))

    def gather(self, token_ids: Tensor) -> Tensor:
        """Return the rows (U, L, E, D) of `token_ids` (U,) int64."""
        return self.request(token_ids).wait()

    def decode(self, codes: Tensor) -> Tensor:
        """Turn (U, row_bytes) stored bytes into (U, L, E, D) rows."""
        layout = self.layout
        vectors = codes.view(len(codes), layout.num_layers, layout.num_experts, layout.vector_bytes)
        return self._codec.decode(vectors, layout.hidden_size)

    def close(self) -> None:
        """Let go of files and threads; further requests raise LutError."""
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None
            self._reader.close()

    def __enter__(self) -> "LutStore":
        """Return the store itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the store."""
        self.close()

    def _read(self, ids: np.ndarray, buffer: Tensor) -> Tensor:
        rows = buffer.numpy()
        self._reader.read(ids, rows)
        if self._verify_rows:
            check_rows(ids, rows, self._checksums[ids], str(self.lut_dir))
        return buffer


def _check_shard(lut_dir: Path, record: ShardRecord) -> None:
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


def _read_checksums(lut_dir: Path, record: ShardRecord) -> np.ndarray:
    with (lut_dir / record.file).open("rb") as handle:
        handle.seek(record.file_bytes - 4 * record.num_tokens)
        return np.frombuffer(handle.read(), dtype="<u4").astype(np.uint32)
