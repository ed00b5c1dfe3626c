"""The open shards of a table: where a row lies in them, and reads that are whole or an error."""

import os
from collections.abc import Sequence
from pathlib import Path

from src.errors import LutError, LutFormatError
from src.lut.layout import Shard, TableLayout, tokens_per_shard


class ShardFiles:
    """Descriptors of every shard; positioned reads share them between threads and with forked children."""

    def __init__(self, lut_dir: Path, layout: TableLayout, shards: Sequence[Shard], flags: int = 0) -> None:
        """Open the shards for reading, with extra `flags` of `os.open`."""
        self.row_bytes = layout.row_bytes
        self.paths = [lut_dir / shard.file_name for shard in shards]
        self._tokens_per_shard = tokens_per_shard(layout)
        self._offsets = [shard.rows_offset(layout) for shard in shards]
        self._descriptors: list[int] = []
        try:
            for path in self.paths:
                self._descriptors.append(os.open(path, os.O_RDONLY | flags))
        except OSError:
            self.close()
            raise

    def locate(self, token_id: int) -> tuple[int, int]:
        """Return the shard of an id and the byte of that file where its row starts."""
        shard, row = divmod(token_id, self._tokens_per_shard)
        return shard, self._offsets[shard] + row * self.row_bytes

    def descriptor(self, shard: int) -> int:
        """Return an open descriptor; LutError after `close`."""
        if not self._descriptors:
            raise LutError(f"{self.paths[shard].parent}: the table is closed; open it again to read")
        return self._descriptors[shard]

    def read(self, shard: int, targets: Sequence[bytearray | memoryview], offset: int, flags: int = 0) -> int:
        """Read once, as `os.preadv` does; a disk that fails raises LutError with the file's name."""
        try:
            return os.preadv(self.descriptor(shard), targets, offset, flags)
        except BlockingIOError:  # the answer to RWF_NOWAIT, not a failure
            raise
        except OSError as error:
            raise LutError(
                f"{self.paths[shard]}: reading from byte {offset:,} failed ({error.strerror}); check the disk and copy "
                "or rebuild the table"
            ) from error

    def read_row(self, shard: int, offset: int, target: memoryview) -> None:
        """Fill `target` from byte `offset` on, however often the kernel stops short."""
        while target:
            count = self.read(shard, [target], offset)
            if count == 0:
                raise self.truncated(shard, offset)
            target, offset = target[count:], offset + count

    def truncated(self, shard: int, offset: int) -> LutFormatError:
        """Return the error for a file that ends where a row should be."""
        size = os.fstat(self.descriptor(shard)).st_size
        return LutFormatError(
            f"{self.paths[shard]}: {size:,} bytes long while the row at byte {offset:,} was read, so it was truncated "
            "after it was opened; copy the table again or rebuild it"
        )

    def close(self) -> None:
        """Close the files; harmless when done twice."""
        while self._descriptors:
            os.close(self._descriptors.pop())
