"""Documents of a source, in a fixed order in which reading can be resumed; and which of them are held out.

Knows no tokens, and does not decide whether too much is wrong: it reports every record that gives no document.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from src.data.config import DataConfig, SourceConfig
from src.data.records import TEXT_BYTES, Problem, Record, read_hub, read_records


class Position(NamedTuple):
    """How far reading has come: everything before it is done."""

    file: int = 0
    """Index of the file in the source's sorted list; 0 in a hub dataset."""
    record: int = 0
    """Records of that file that are done."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text and where it came from."""

    text: str
    where: str
    """`file:line`."""
    num_records: int
    """Records it was made of."""
    end: Position
    """Where reading continues after it."""
    offset: int
    """Progress within its file: bytes, or rows of a hub dataset."""

    @property
    def content_hash(self) -> str:
        """SHA-256 of the text, in hexadecimal digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Skipped:
    """A record that gives no document."""

    problem: Problem
    where: str
    detail: str


START = Position()


def read_source(source: SourceConfig, files: list[Path], start: Position = START) -> Iterator[Document | Skipped]:
    """Yield the documents of a source, and the records that give none, beginning at `start`.

    Args:
        source: what to read.
        files: its files, as `source_files` gives them; unused for a hub dataset.
        start: the `end` of the last document that is done.
    """
    if source.hub is not None:
        yield from _documents(read_hub(source, skip=start.record), source, source.hub, start)
        return
    for index in range(start.file, len(files)):
        position = start if index == start.file else Position(index)
        records = read_records(
            files[index], source.text_field, lines=source.document_start is not None, skip=position.record
        )
        yield from _documents(records, source, str(files[index]), position)


def is_held_out(content_hash: str, fraction: float, seed: int) -> bool:
    """Decide by content, so that a document stays on its side whatever else the corpus holds."""
    digest = hashlib.sha256(f"{seed} {content_hash}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def sides(document: Document, content_hash: str, config: DataConfig, held_out_part: float) -> list[tuple[str, bool]]:
    """Return the texts that a document gives, and whether each is held out.

    Args:
        document: its whole text is on one side, chosen by `is_held_out`, unless `held_out_part` is above 0.
        content_hash: of the document.
        config: decides which documents are held out.
        held_out_part: share at the end of each document that is held out, cut at a line end if one is near; below 1.
    """
    text = document.text
    if not held_out_part:
        return [(text, is_held_out(content_hash, config.validation_fraction, config.seed))]
    cut = int(len(text) * (1 - held_out_part))
    cut = text.rfind("\n", cut - (len(text) - cut) // 2, cut) + 1 or cut
    parts = [(text[:cut], False), (text[cut:], True)]
    return parts if all(part.strip() for part, _ in parts) else [(text, False)]


def _documents(
    records: Iterator[Record], source: SourceConfig, name: str, position: Position
) -> Iterator[Document | Skipped]:
    if source.document_start is not None:
        yield from _joined(records, re.compile(source.document_start), name, position)
        return
    done = position.record
    for record in records:
        done += 1
        where, end = f"{name}:{record.line}", Position(position.file, done)
        if record.problem is not None:
            yield Skipped(record.problem, where, record.detail)
        elif record.text is not None:
            yield Document(record.text, where, 1, end, record.offset)


def _joined(
    records: Iterator[Record], opening: re.Pattern[str], name: str, position: Position
) -> Iterator[Document | Skipped]:
    """Join rows up to the next one that opens a document, or until the document is long; empty rows are joined too."""
    parts: list[str] = []
    line, size, done, offset = 1, 0, position.record, 0

    def document() -> Document:
        return Document("".join(parts), f"{name}:{line}", len(parts), Position(position.file, done), offset)

    for record in records:
        text = record.text
        if text is None:
            assert record.problem is not None
            yield Skipped(record.problem, f"{name}:{record.line}", record.detail)
        else:
            if parts and (opening.match(text) or size > TEXT_BYTES):
                yield document()
                parts, line, size = [], record.line, 0
            parts.append(text if text.endswith("\n") else text + "\n")
            size += len(text)
        done, offset = done + 1, record.offset
    if size and any(map(str.strip, parts)):
        yield document()
