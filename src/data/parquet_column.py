"""Values of one column of a Parquet file, in little memory. Knows nothing of what they mean."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow
import pyarrow.parquet

from src.data.files import READ_BYTES
from src.errors import DataError

_BATCH_ROWS = 64


def parquet_values(data: BinaryIO, path: Path, column: str, skip: int) -> Iterator[tuple[int, object]]:
    """Yield the number of each row after the first `skip`, from 1, and its value; bytes where it is not UTF-8.

    Row groups that are skipped whole are not read.

    Raises:
        DataError: the file is not a readable Parquet file, or has no such column.
    """
    if path.suffix != ".parquet":
        raise DataError(f"{path}: Parquet compresses inside; unpack the file and drop its ending {path.suffix}")
    try:
        table = pyarrow.parquet.ParquetFile(data, buffer_size=READ_BYTES)
        _require_column(table.schema_arrow.names, column, path)
        first = 0
        for group in range(table.num_row_groups):
            num_rows = table.metadata.row_group(group).num_rows
            if first + num_rows > skip:
                for number, value in enumerate(_group_values(table, group, column), start=first + 1):
                    if number > skip:
                        yield number, value
            first += num_rows
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}); fetch it again") from error


def _group_values(table: pyarrow.parquet.ParquetFile, group: int, column: str) -> Iterator[object]:
    for batch in table.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[column], use_threads=False):
        for value in batch.column(0):
            try:
                yield value.as_py()
            except UnicodeDecodeError as error:
                yield error.object


def _require_column(names: list[str], column: str, path: Path) -> None:
    if column not in names:
        raise DataError(f"{path}: has no column {column!r}, only {', '.join(names)}; set text_field to one of them")
