"""Decides what is tokenized together and which shard it belongs to; drops duplicates, counts what is skipped.

Duplicates are found by 64 bits of each document's hash: among 100 million different documents, the chance that any two
are taken for duplicates is 1 in 3,700. Knows no tokens.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from src.data.config import DataConfig, SourceConfig
from src.data.corpus import START, Document, Position, Skipped, read_source, sides
from src.data.shards import FinishedShard, Tally, require_within_budgets, shard_hashes, total

_BATCH_CHARACTERS = 1 << 20
_LOAD = 0.6
_FIRST_SLOTS = 1 << 12
_SLOT_BYTES = 8


class HashSet:
    """Remembers 64-bit hashes in at most `memory_mb` MB, also while it grows and holds the old and the new table."""

    def __init__(self, memory_mb: int) -> None:
        most = memory_mb * 10**6 * 2 // 3 // _SLOT_BYTES
        self.max_slots = max(_FIRST_SLOTS, 1 << (most.bit_length() - 1))
        self.count = 0
        self._slots = _empty(_FIRST_SLOTS)

    @property
    def is_full(self) -> bool:
        """Whether new hashes are no longer remembered."""
        return len(self._slots) == self.max_slots and self.count >= _LOAD * self.max_slots

    def add(self, value: int) -> bool:
        """Return whether `value`, in [0, 2**64), is new; remember it unless the set is full."""
        value = value or 1  # 0 marks a free slot
        index, is_new = self._find(value)
        if not is_new or self.is_full:
            return is_new
        self._slots[index] = value
        self.count += 1
        if self.count >= _LOAD * len(self._slots) and len(self._slots) < self.max_slots:
            self._grow()
        return True

    def _find(self, value: int) -> tuple[int, bool]:
        slots, mask = self._slots, len(self._slots) - 1
        index = (value * 0x9E3779B97F4A7C15 >> 20) & mask
        while (found := slots[index]) and found != value:
            index = (index + 1) & mask
        return index, not found

    def _grow(self) -> None:
        old, self._slots = self._slots, _empty(2 * len(self._slots))
        for value in old:
            if value:
                self._slots[self._find(value)[0]] = value


def _empty(slots: int) -> "array[int]":
    return array("Q", bytes(_SLOT_BYTES)) * slots


class Closing(NamedTuple):
    """What a shard ends with."""

    tally: Tally
    hashes: "array[int]"
    end: Position
    is_last: bool


@dataclass(slots=True)
class Batch:
    """Documents that are tokenized together; all belong to one shard."""

    shard: int
    texts: list[str] = field(default_factory=list[str])
    held_out: list[bool] = field(default_factory=list[bool])
    file: int = 0
    """Index of the file that was read last."""
    offset: int = 0
    """Progress within it."""
    closing: Closing | None = None
    """Set on the last batch of a shard."""


class BatchPlanner:
    """Reads a source from the end of its finished shards in `directory`. What it yields depends on the inputs alone."""

    def __init__(
        self,
        source: SourceConfig,
        files: Sequence[Path],
        config: DataConfig,
        finished: Sequence[FinishedShard],
        directory: Path,
        held_out_part: float = 0.0,
    ) -> None:
        self._source, self._files, self._config, self._held_out_part = source, list(files), config, held_out_part
        self._done = total(record.tally for record in finished)
        self._start, self._shard = finished[-1].end if finished else START, len(finished)
        self._seen = HashSet(config.duplicate_memory_mb)
        for number in range(len(finished)):
            for value in shard_hashes(directory, number):
                self._seen.add(value)
        self._begin_shard(self._start)

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches; the last one closes the last shard and may be empty."""
        batch, characters = Batch(self._shard), 0
        for item in read_source(self._source, self._files, self._start):
            if isinstance(item, Skipped):
                self._skip(item)
                continue
            batch.file, batch.offset = item.end.file, item.offset
            self._add(item, batch)
            characters += len(item.text)
            is_full = self._shard_bytes >= self._config.shard_mb * 10**6
            if is_full or characters >= _BATCH_CHARACTERS:
                batch.closing = self._close(is_last=False) if is_full else None
                yield batch
                batch, characters = Batch(self._shard, file=batch.file, offset=batch.offset), 0
        batch.closing = self._close(is_last=True)
        yield batch

    def _skip(self, record: Skipped) -> None:
        self._tally.skip(record)
        require_within_budgets(self._done + self._tally, self._config, self._source.label, at_end=False)

    def _add(self, document: Document, batch: Batch) -> None:
        content_hash = document.content_hash
        self._end = document.end
        self._tally.records += document.num_records
        value = int(content_hash[:16], 16)
        if not self._seen.add(value):
            self._tally.duplicates += 1
            return
        self._tally.unremembered += self._seen.is_full
        self._hashes.append(value)
        for text, held_out in sides(document, content_hash, self._config, self._held_out_part):
            side, num_bytes = self._tally.validation if held_out else self._tally.train, len(text.encode())
            side.documents += 1
            side.bytes += num_bytes
            self._shard_bytes += num_bytes
            batch.texts.append(text)
            batch.held_out.append(held_out)

    def _close(self, *, is_last: bool) -> Closing:
        closing = Closing(self._tally, self._hashes, self._end, is_last)
        self._done, self._shard = self._done + self._tally, self._shard + 1
        self._begin_shard(self._end)
        return closing

    def _begin_shard(self, start: Position) -> None:
        self._tally, self._hashes, self._end, self._shard_bytes = Tally(), array("Q"), start, 0
