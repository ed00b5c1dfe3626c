"""Records of a file: one text after another, or what is wrong with one. Knows no documents, tokens or budgets.

Every reader takes `skip`, the records that are already done, and steps over them without interpreting them.

Items of a JSON array, one at a time, whatever its length. Knows nothing of what the items mean.

Values of one column of a Parquet file, in little memory. Knows nothing of what they mean.

Records of Hugging Face datasets, by name on the hub or from a folder in the same layout.
"""

import codecs
import json
from collections.abc import Iterator
from itertools import count
from json import JSONDecodeError
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import pyarrow
import pyarrow.parquet

from src.data.config import SourceConfig
from src.data.files import READ_BYTES, OpenFile, format_suffix, open_file
from src.errors import DataError

_READ_BYTES = 1 << 20
_ITEM_CHARACTERS = 64 << 20
_SPACE = " \t\r\n"


def array_items(data: BinaryIO, path: Path) -> Iterator[tuple[int, object]]:
    """Yield the line on which each item of the array ends, from 1, and the item.

    Raises:
        DataError: the text is not a JSON array; after a syntax error nothing tells where the next item starts.
    """
    decoder, scanner = json.JSONDecoder(), _Scanner(data, path)
    scanner.expect("[")
    if scanner.next_is("]"):
        return
    while True:
        item = scanner.item(decoder)
        yield scanner.line, item
        if scanner.next_is("]"):
            return
        scanner.expect(",")


class _Scanner:
    def __init__(self, data: BinaryIO, path: Path) -> None:
        self._data, self._path = data, path
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._text, self._at, self.line, self._ended = "", 0, 1, False

    def expect(self, mark: str) -> None:
        if not self.next_is(mark):
            self._fail(f"expected {mark!r}")

    def next_is(self, mark: str) -> bool:
        """Step over white space and, if it follows, over `mark`."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._advance(self._at + 1)
            if self._at < len(self._text):
                break
            if not self._read():
                self._fail("the array is cut off")
        if self._text[self._at] != mark:
            return False
        self._advance(self._at + 1)
        return True

    def item(self, decoder: json.JSONDecoder) -> object:
        self.next_is("")
        wanted = _READ_BYTES
        while True:
            try:
                item, end = decoder.raw_decode(self._text, self._at)
            except (json.JSONDecodeError, RecursionError) as error:
                if len(self._text) - self._at > _ITEM_CHARACTERS or not self._read(wanted):
                    self._fail(str(error))
                wanted *= 2  # so that a long item is not parsed from its start too often
                continue
            if end < len(self._text) or not self._read():  # a number may go on in the next piece
                self._advance(end)
                return item

    def _advance(self, end: int) -> None:
        self.line += self._text.count("\n", self._at, end)
        self._at = end

    def _read(self, num_bytes: int = _READ_BYTES) -> bool:
        if self._ended:
            return False
        piece = self._data.read(num_bytes)
        self._ended = not piece
        try:
            self._text = self._text[self._at :] + self._decode(piece, final=self._ended)
        except UnicodeDecodeError as error:
            self._fail(f"not UTF-8 ({error.reason})")
        self._at = 0
        return not self._ended

    def _fail(self, reason: str) -> None:
        raise DataError(
            f"{self._path}:{self.line}: not a JSON array ({reason}); correct the file, or write one object a line, "
            "where broken ones can be skipped"
        )


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


Problem = Literal["malformed UTF-8", "broken JSON", "missing text", "empty"]
"""Why a record gives no document."""

TEXT_BYTES = 16 << 20
"""A text file longer than this is cut at line ends into several documents, so that memory stays bounded."""
LINE_BYTES = 64 << 20
"""A longer line is refused: it is not text, or not one record a line."""


class Record(NamedTuple):
    """One record: its text, or the problem with it."""

    text: str | None
    """None where it cannot be told; white space where the record is empty."""
    problem: Problem | None
    line: int
    """Line, or row where a format has no lines, at which it starts; from 1."""
    detail: str
    """What exactly is wrong; empty when nothing is."""
    offset: int
    """Bytes of the file that had been read by then."""


class Malformed(Exception):  # noqa: N818 - not an error by itself: it is counted, and the budget decides
    """A record that gives no text."""

    def __init__(self, problem: Problem, detail: str, line: int = 0) -> None:
        """Remember what is wrong, and on which line of the record, from 0."""
        super().__init__(detail)
        self.problem: Problem = problem
        self.line = line


Row = tuple[int, str | Malformed]
"""Line and text, or what is wrong with it."""


def read_records(path: Path, text_field: str, *, lines: bool, skip: int = 0) -> Iterator[Record]:
    """Yield the records of a file after the first `skip`.

    Args:
        path: read by its ending: JSON lines, JSON array, Parquet, otherwise text; `.gz` and `.zst` are decompressed.
        text_field: key or column that holds the text.
        lines: each line of a text file is a record, instead of the whole file.
        skip: records to step over.

    Raises:
        DataError: the file cannot be read, or a line is longer than `LINE_BYTES`.
    """
    with open_file(path) as opened:
        match format_suffix(path):
            case ".parquet":
                rows = (
                    (row, _text_or_problem(value, text_field))
                    for row, value in parquet_values(opened.data, path, text_field, skip)
                )
            case ".jsonl":
                rows = _json_lines(opened.data, path, text_field, skip)
            case ".json" if _starts_with_bracket(opened.data):
                rows = _json_items(opened.data, path, text_field, skip)
            case ".json":
                rows = _json_lines(opened.data, path, text_field, skip)
            case _ if lines:
                rows = _text_lines(opened.data, path, skip)
            case _:
                rows = _text_pieces(opened.data, skip)
        yield from _checked(rows, opened)


def text_of(row: object, text_field: str) -> str:
    """Return the text of a decoded row; Malformed when it has none."""
    value: object = row.get(text_field) if isinstance(row, dict) else row
    if isinstance(value, bytes):
        value = _decode(value)
        if isinstance(value, Malformed):
            raise value
    if not isinstance(value, str):
        keys = ", ".join(map(str, row)) if isinstance(row, dict) else f"a {type(row).__name__}"
        raise Malformed("missing text", f"no text in {text_field!r} (found {keys[:100]})")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Malformed("malformed UTF-8", f"half a surrogate pair at character {error.start}") from error
    return value


def _checked(rows: Iterator[Row], opened: OpenFile) -> Iterator[Record]:
    for line, text in rows:
        offset = opened.raw.tell()
        if isinstance(text, Malformed):
            yield Record(None, text.problem, line + text.line, str(text), offset)
        elif not text.strip():
            yield Record(text, "empty", line, "no text", offset)
        else:
            yield Record(text, None, line, "", offset)


def _text_pieces(data: BinaryIO, skip: int) -> Iterator[Row]:
    line, left_over, number = 1, b"", 0
    while piece := left_over + data.read(TEXT_BYTES - len(left_over)):
        end = _cut_point(piece) if len(piece) == TEXT_BYTES else len(piece)
        piece, left_over = piece[:end], piece[end:]
        if number >= skip:
            yield line, _decode(piece)
        line, number = line + piece.count(b"\n"), number + 1
    if number == 0 == skip:
        yield 1, ""


def _cut_point(piece: bytes) -> int:
    """Return where a piece that may go on is cut: behind its last line, or in front of its last character."""
    if end := piece.rfind(b"\n") + 1:
        return end
    end = len(piece) - 1
    while end > len(piece) - 4 and piece[end] & 0xC0 == 0x80:  # inside a UTF-8 character
        end -= 1
    return end


def _text_lines(data: BinaryIO, path: Path, skip: int) -> Iterator[Row]:
    for number, line in enumerate(_lines(data, path), start=1):
        if number > skip:
            yield number, _decode(line)


def _json_lines(data: BinaryIO, path: Path, text_field: str, skip: int) -> Iterator[Row]:
    for number, line in enumerate(_lines(data, path), start=1):
        if number > skip:
            yield number, _json_text(line, text_field)


def _json_items(data: BinaryIO, path: Path, text_field: str, skip: int) -> Iterator[Row]:
    for number, (line, item) in enumerate(array_items(data, path)):
        if number >= skip:
            yield line, _text_or_problem(item, text_field)


def _lines(data: BinaryIO, path: Path) -> Iterator[bytes]:
    number = 0
    while line := data.readline(LINE_BYTES):
        number += 1
        if len(line) == LINE_BYTES and not line.endswith(b"\n"):
            raise DataError(
                f"{path}:{number}: a line of more than {LINE_BYTES >> 20} MiB, but a record is one line; "
                "is this file of another format than its ending says?"
            )
        yield line


def _decode(raw: bytes) -> str | Malformed:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line_start = raw.rfind(b"\n", 0, error.start) + 1
        detail = f"not UTF-8 at byte {error.start - line_start} of the line"
        return Malformed("malformed UTF-8", detail, raw.count(b"\n", 0, error.start))


def _json_text(line: bytes, text_field: str) -> str | Malformed:
    if isinstance(text := _decode(line), Malformed) or not text.strip():
        return text
    try:
        row = json.loads(text.rstrip())
    except (JSONDecodeError, RecursionError) as error:
        return Malformed("broken JSON", f"not JSON: {error}")
    return _text_or_problem(row, text_field)


def _text_or_problem(row: object, text_field: str) -> str | Malformed:
    try:
        return text_of(row, text_field)
    except Malformed as problem:
        return problem


def _starts_with_bracket(data: BinaryIO) -> bool:
    peek = getattr(data, "peek")  # noqa: B009 - every opened file is an io.BufferedReader
    return peek(64).lstrip().startswith(b"[")


def read_hub(source: SourceConfig, *, skip: int = 0) -> Iterator[Record]:
    """Yield the records of a hub dataset after the first `skip`.

    Raises:
        DataError: the dataset cannot be had (no network, unknown name, subset or split), or has no such column.
    """
    rows = _open(source)
    columns = rows.column_names  # unknown until the first row for some streams
    if columns is not None and source.text_field not in columns:
        raise DataError(
            f"{source.hub}: has no column {source.text_field!r}, only {', '.join(columns)}; "
            "set text_field to one of them"
        )
    if not source.streaming and skip >= len(rows):  # stored datasets refuse to skip all of themselves
        return
    rest = iter(rows.skip(skip))
    for number in count(skip + 1):
        try:
            row = next(rest)
        except StopIteration:
            return
        except Exception as error:  # the library, its hub client and its readers raise many kinds
            raise DataError(
                f"{source.hub}: reading stopped at row {number:,} ({_kind(error)}); run again, what is done is kept"
            ) from error
        yield _record(row, number, source.text_field)


def hub_rows(source: SourceConfig) -> int | None:
    """Return how many rows the split has, where its description says so; never downloads data."""
    import datasets  # here, not above: it takes seconds to import, and most corpora do not need it

    try:
        splits = datasets.load_dataset_builder(str(source.hub), source.subset, revision=source.revision).info.splits
    except Exception:  # noqa: BLE001 - only the time left depends on it; reading reports what is wrong
        return None
    return splits[source.split].num_examples if splits and source.split in splits else None


def _open(source: SourceConfig) -> Any:  # datasets.Dataset or IterableDataset
    import datasets  # as above

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(
            str(source.hub), source.subset, split=source.split, revision=source.revision, streaming=source.streaming
        )
    except Exception as error:  # the library, its hub client and its readers raise many kinds
        where = f"{source.hub}" + (f" ({source.subset})" if source.subset else "")
        raise DataError(
            f"{where}: split {source.split!r} cannot be had from the Hugging Face hub "
            f"({_kind(error)}); check name, subset, split and network"
        ) from error


def _kind(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _record(row: Any, number: int, text_field: str) -> Record:
    try:
        text = text_of(row, text_field)
    except Malformed as problem:
        return Record(None, problem.problem, number, str(problem), number)
    if not text.strip():
        return Record(text, "empty", number, "no text", number)
    return Record(text, None, number, "", number)
