"""Records of a file: one text after another, or what is wrong with one. Knows no documents, tokens or budgets.

Every reader takes `skip`, the records that are already done, and steps over them without interpreting them.
"""

import json
from collections.abc import Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from src.data.files import OpenFile, format_suffix, open_file
from src.data.json_array import array_items
from src.data.parquet_column import parquet_values
from src.errors import DataError

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
