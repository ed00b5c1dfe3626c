"""Records of a source: one text after another, or what is wrong with one. Knows no documents, tokens or budgets.

A file is read by its ending; a Hugging Face dataset by its name on the hub, or from a folder in the same layout. Every
reader takes `skip`, the records that are already done, and steps over them without interpreting them. Memory is
bounded by the longest record, whatever the length of a file.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, NoReturn

import pyarrow
import pyarrow.parquet

from src.data.config import SourceConfig
from src.data.files import READ_BYTES, format_suffix, last_suffix, open_file
from src.errors import DataError

Problem = Literal["malformed UTF-8", "not text", "broken JSON", "missing text", "empty"]
"""Why a record gives no document."""

TEXT_BYTES = 16 << 20
"""A text file longer than this is cut at line ends into several documents, so that memory stays bounded."""
LINE_BYTES = 64 << 20
"""A longer line is refused: it is not text, or not one record a line."""
_ITEM_CHARACTERS = 64 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
_JSON_MARK = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{},]', re.DOTALL)
_KINDS = {"bool": "true or false", "int": "a number", "float": "a number", "list": "a list", "dict": "an object"}
_BATCH_ROWS = 64


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
    """Bytes of the file that had been read by then, or rows of a hub dataset."""


class Malformed(NamedTuple):
    """What is wrong with a record that gives no text."""

    problem: Problem
    detail: str
    line: int = 0
    """On which line of the record, from 0."""


Row = tuple[int, str | Malformed]
"""Line and text, or what is wrong with it."""


def read_records(path: Path, text_field: str, *, lines: bool, skip: int = 0) -> Iterator[Record]:
    """Yield the records of a file after the first `skip`.

    Args:
        path: read by its ending: JSON lines, JSON array, Parquet, otherwise text, after decompression.
        text_field: key or column that holds the text.
        lines: each line of a text file is a record, instead of the whole file.
        skip: records to step over.

    Raises:
        DataError: the file cannot be read, or a line is longer than `LINE_BYTES`.
    """
    with open_file(path) as opened:
        match format_suffix(path):
            case ".parquet":
                rows = _parquet_rows(opened.data, path, text_field, skip)
            case ".json" if _starts_with_bracket(opened.data):
                rows = _json_items(opened.data, path, text_field, skip)
            case ".json" | ".jsonl":
                rows = _lines(opened.data, path, skip, lambda line: _json_text(line, text_field))
            case _ if lines:
                rows = _lines(opened.data, path, skip, _decode)
            case _:
                rows = _text_pieces(opened.data, skip)
        for line, text in rows:
            yield _record(line, text, opened.raw.tell())


def text_of(row: object, text_field: str) -> str | Malformed:
    """Return the text of a decoded row, or what is wrong with it; null is an empty text."""
    if isinstance(row, dict) and text_field not in row:
        return Malformed("missing text", f"no key {text_field!r} (found {', '.join(map(str, row))[:100] or 'no keys'})")
    value: object = row[text_field] if isinstance(row, dict) else row
    if isinstance(value, bytes):
        return _decode(value)
    if value is None:
        return ""
    if not isinstance(value, str):
        found = _KINDS.get(kind := type(value).__name__, f"a value of type {kind}")
        return Malformed("missing text", f"no text in {text_field!r} (found {found})")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return Malformed("malformed UTF-8", f"half a surrogate pair at character {error.start}")
    return value


def _record(line: int, text: str | Malformed, offset: int) -> Record:
    if isinstance(text, Malformed):
        return Record(None, text.problem, line + text.line, text.detail, offset)
    if not text.strip():
        return Record(text, "empty", line, "no text", offset)
    return Record(text, None, line, "", offset)


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
    """Return where to cut a piece that may continue: after its last line, or before its last character."""
    if end := piece.rfind(b"\n") + 1:
        return end
    end = len(piece) - 1
    while end > len(piece) - 4 and piece[end] & 0xC0 == 0x80:  # inside a UTF-8 character
        end -= 1
    return end


def _lines(data: BinaryIO, path: Path, skip: int, text: Callable[[bytes], str | Malformed]) -> Iterator[Row]:
    number = 0
    while line := data.readline(LINE_BYTES):
        number += 1
        if len(line) == LINE_BYTES and not line.endswith(b"\n"):
            raise DataError(
                f"{path}:{number}: a line of more than {LINE_BYTES >> 20} MiB, but a record is one line; "
                "is this file of another format than its ending says?"
            )
        if number > skip:
            yield number, text(line)


def _decode(raw: bytes) -> str | Malformed:
    if (zero := raw.find(b"\0")) >= 0:
        return _malformed(raw, zero, "not text", "a NUL byte, as in binary files and UTF-16,")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        return _malformed(raw, error.start, "malformed UTF-8", "not UTF-8")


def _malformed(raw: bytes, place: int, problem: Problem, what: str) -> Malformed:
    line_start = raw.rfind(b"\n", 0, place) + 1
    return Malformed(problem, f"{what} at byte {place - line_start} of the line", raw.count(b"\n", 0, place))


def _json_text(line: bytes, text_field: str) -> str | Malformed:
    if isinstance(text := _decode(line), Malformed) or not text.strip():
        return text
    try:
        row = json.loads(text.rstrip())
    except (ValueError, RecursionError) as error:
        return _broken(error)
    return text_of(row, text_field)


def _broken(error: ValueError | RecursionError) -> Malformed:
    return Malformed("broken JSON", f"not JSON: {str(error).partition(';')[0]}")  # without the library's advice


def _starts_with_bracket(data: BinaryIO) -> bool:
    peek = getattr(data, "peek")  # noqa: B009 - every opened file is an io.BufferedReader
    return peek(64).lstrip().startswith(b"[")


def _json_items(data: BinaryIO, path: Path, text_field: str, skip: int) -> Iterator[Row]:
    """Yield the line on which each item of a JSON array ends, and its text.

    Raises:
        DataError: the text is not a JSON array; after a syntax error nothing tells where the next item starts.
    """
    array = _JsonArray(data, path)
    array.take("[")
    if array.peek() == "]":
        return
    for number in count():
        item = array.item()
        if number >= skip:
            yield array.line, item if isinstance(item, Malformed) else text_of(item, text_field)
        if array.peek() == "]":
            return
        array.take(",")


class _JsonArray:
    def __init__(self, data: BinaryIO, path: Path) -> None:
        self._data, self._path, self._decoder = data, path, json.JSONDecoder()
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._text, self._at, self.line, self._ended = "", 0, 1, False

    def peek(self) -> str:
        """Step over white space and return the next character."""
        while True:
            space = _SPACE.match(self._text, self._at)
            self._advance(space.end() if space else self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read(READ_BYTES):
                self._fail("the array is cut off")

    def take(self, mark: str) -> None:
        if self.peek() != mark:
            self._fail(f"expected {mark!r}")
        self._advance(self._at + 1)

    def item(self) -> object:
        """Return the next item; Malformed where it is JSON, but too deep or with too long a number."""
        self.peek()
        wanted = READ_BYTES
        while True:
            try:
                item, end = self._decoder.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                end = None if isinstance(error, json.JSONDecodeError) else self._end_of_item()
                if end is not None:
                    self._advance(end)
                    return _broken(error)
                if len(self._text) - self._at > _ITEM_CHARACTERS or not self._read(wanted):
                    self._fail(str(error))
                wanted *= 2  # so that a long item is not parsed from its start too often
                continue
            if end < len(self._text) or not self._read(READ_BYTES):  # a number may continue in the next piece
                self._advance(end)
                return item

    def _end_of_item(self) -> int | None:
        """Return where the item ends by its brackets; None if that is not read yet."""
        depth = 0
        for found in _JSON_MARK.finditer(self._text, self._at):
            mark = found[0]
            if mark == '"':
                return None
            if depth == 0 and mark in "],}":
                return found.start()
            depth += (mark in "[{") - (mark in "]}")
            if depth == 0 and mark in "]}":
                return found.end()
        return None

    def _advance(self, end: int) -> None:
        self.line += self._text.count("\n", self._at, end)
        self._at = end

    def _read(self, num_bytes: int) -> bool:
        piece = b"" if self._ended else self._data.read(num_bytes)
        self._ended = not piece
        try:
            self._text, self._at = self._text[self._at :] + self._decode(piece, final=self._ended), 0
        except UnicodeDecodeError as error:
            self._fail(f"not UTF-8 ({error.reason})")
        return not self._ended

    def _fail(self, reason: str) -> NoReturn:
        raise DataError(
            f"{self._path}:{self.line}: not a JSON array ({reason}); correct the file, or write one object a line, "
            "where broken ones can be skipped"
        )


def _parquet_rows(data: BinaryIO, path: Path, column: str, skip: int) -> Iterator[Row]:
    """Yield the number of each row and its text. Row groups that are skipped whole are not read.

    Raises:
        DataError: the file is not a readable Parquet file, or has no such column.
    """
    if last_suffix(path) != ".parquet":
        raise DataError(f"{path}: Parquet compresses inside; unpack the file and drop its ending {path.suffix}")
    try:
        table = pyarrow.parquet.ParquetFile(data, buffer_size=READ_BYTES)
        _require_column(table.schema_arrow.names, column, str(path))
        first = 0
        for group in range(table.num_row_groups):
            num_rows = table.metadata.row_group(group).num_rows
            if first + num_rows > skip:
                for number, value in enumerate(_group_values(table, group, column), start=first + 1):
                    if number > skip:
                        yield number, text_of(value, column)
            first += num_rows
    except (pyarrow.ArrowException, UnicodeDecodeError, OverflowError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}); fetch it again") from error


def _group_values(table: pyarrow.parquet.ParquetFile, group: int, column: str) -> Iterator[object]:
    for batch in table.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[column], use_threads=False):
        for value in batch.column(0):
            try:
                yield value.as_py()
            except UnicodeDecodeError as error:
                yield error.object


def _require_column(names: list[str], column: str, where: str) -> None:
    if column not in names:
        raise DataError(f"{where}: has no column {column!r}, only {', '.join(names)}; set text_field to one of them")


def read_hub(source: SourceConfig, *, skip: int = 0) -> Iterator[Record]:
    """Yield the records of a hub dataset after the first `skip`.

    Raises:
        DataError: the dataset cannot be downloaded (no network, unknown name, subset or split) or lacks the column.
    """
    rows = _open(source)
    columns = rows.column_names  # unknown until the first row for some streams
    if columns is not None:
        _require_column(columns, source.text_field, str(source.hub))
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
                f"{source.hub}: reading stopped at row {number:,} ({_kind(error)}); run again to continue from there"
            ) from error
        yield _record(number, text_of(row, source.text_field), number)


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
        dataset = f"{source.hub}" + (f" ({source.subset})" if source.subset else "")
        raise DataError(
            f"could not download {dataset}, split {source.split!r}, from the Hugging Face Hub: {_kind(error)}; "
            "check the name, subset and split, your network or HF_TOKEN"
        ) from error


def _kind(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
