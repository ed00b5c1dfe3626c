"""Shards of token ids on disk, all of them as one sequence, and counts of what they hold and what was skipped.

A shard is the files `00003.train.bin`, `00003.validation.bin` (little-endian ids, documents separated by the
end-of-text id), `00003.hashes` (of its documents, until the source is done) and `00003.json`, which is written last
and makes it whole. Counts are kept per shard and must stay within the budgets of the config. Knows nothing of text.
"""

import hashlib
import json
import os
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from src.data.config import DataConfig
from src.data.corpus import Position, Skipped
from src.data.encoder import Encoded
from src.errors import DataError
from src.system.files import sync_directory, write_text, writing

_SETTLED_RECORDS = 10_000
"""Records after which a share far over its budget stops the work at once; before, the end of the source decides."""
_EARLY_FACTOR = 10
"""How far over; the broken records may all be at the beginning."""
_EMPTY = "empty"


@dataclass(kw_only=True)
class SplitCount:
    """Size of one side of the split."""

    documents: int = 0
    """Documents, or parts of them where each is cut in two."""
    tokens: int = 0
    """Ids, each document's separator included."""
    bytes: int = 0
    """UTF-8 bytes of text."""

    def __add__(self, other: Self) -> Self:
        return type(self)(
            documents=self.documents + other.documents,
            tokens=self.tokens + other.tokens,
            bytes=self.bytes + other.bytes,
        )


@dataclass(kw_only=True)
class Tally:
    """What was read, kept and left out."""

    records: int = 0
    train: SplitCount = field(default_factory=SplitCount)
    validation: SplitCount = field(default_factory=SplitCount)
    duplicates: int = 0
    """Documents dropped because an equal one came before."""
    unremembered: int = 0
    """Documents whose later duplicates are kept, because the memory for hashes was full."""
    skipped: dict[str, int] = field(default_factory=dict[str, int])
    """Records that gave no document, by problem."""
    examples: dict[str, str] = field(default_factory=dict[str, str])
    """The first record of each problem, as `file:line: what is wrong`."""

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> Self:
        sides = {side: SplitCount(**values[side]) for side in ("train", "validation")}  # type: ignore[arg-type]
        return cls(**{**values, **sides})  # type: ignore[arg-type]

    def __add__(self, other: Self) -> Self:
        """Return the sum; of each problem the first example is kept."""
        return type(self)(
            records=self.records + other.records,
            train=self.train + other.train,
            validation=self.validation + other.validation,
            duplicates=self.duplicates + other.duplicates,
            unremembered=self.unremembered + other.unremembered,
            skipped={
                problem: self.skipped.get(problem, 0) + other.skipped.get(problem, 0)
                for problem in self.skipped | other.skipped
            },
            examples=other.examples | self.examples,
        )

    def skip(self, record: Skipped) -> None:
        self.records += 1
        self.skipped[record.problem] = self.skipped.get(record.problem, 0) + 1
        self.examples.setdefault(record.problem, f"{record.where}: {record.detail}")


def total(tallies: Iterable[Tally]) -> Tally:
    """Return the sum of tallies."""
    return reduce(Tally.__add__, tallies, Tally())


def require_within_budgets(tally: Tally, config: DataConfig, label: str, *, at_end: bool) -> None:
    """Raise DataError, naming file and line, when more records were skipped than the config allows.

    Before the end of a source nothing is judged until enough records have been seen.
    """
    if not at_end and tally.records < _SETTLED_RECORDS:
        return
    malformed = [problem for problem in tally.skipped if problem != _EMPTY]
    for problems, key in ((malformed, "max_malformed_fraction"), ([_EMPTY], "max_empty_fraction")):
        count, allowed = sum(tally.skipped.get(problem, 0) for problem in problems), getattr(config, key)
        if count > allowed * tally.records * (1 if at_end else _EARLY_FACTOR):
            first = next(tally.examples[problem] for problem in problems if problem in tally.examples)
            raise DataError(
                f"{first}; {count:,} of {tally.records:,} records of {label} are {' or '.join(problems)}, more than "
                f"data.{key} ({allowed:g}) allows; correct the text, leave it out, or raise that share"
            )


SPLITS = ("train", "validation")
_OPEN_SHARDS = 256


@dataclass(frozen=True, kw_only=True)
class FinishedShard:
    """What `00003.json` says."""

    tally: Tally
    sha256: dict[str, str]
    """Per split, of its file."""
    end: Position
    """Where reading continues after this shard."""
    is_last: bool
    """Whether the source ends with it."""

    @classmethod
    def read(cls, path: Path) -> Self:
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            tally=Tally.from_dict(values["tally"]),
            sha256=values["sha256"],
            end=Position(*values["end"]),
            is_last=values["is_last"],
        )


class ShardWriter:
    """Writes one shard, over whatever an interruption left of it."""

    def __init__(self, directory: Path, number: int) -> None:
        self._stem = directory / f"{number:05d}"
        with writing(self._stem, directory):
            self._files = {split: self._path(f".{split}.bin").open("wb") for split in SPLITS}
        self._digests = {split: hashlib.sha256() for split in SPLITS}
        self._tokens: dict[str, int] = dict.fromkeys(SPLITS, 0)

    def write(self, encoded: Encoded, held_out: NDArray[np.bool_]) -> None:
        """Append a batch; `held_out` (documents,) marks the documents of the held-out split."""
        is_held_out = np.repeat(held_out, encoded.lengths)  # (tokens,)
        for split, chosen in (("train", ~is_held_out), ("validation", is_held_out)):
            token_ids = encoded.token_ids[chosen]
            with writing(self._path(f".{split}.bin")):
                self._files[split].write(token_ids.data)
            self._digests[split].update(token_ids.data)
            self._tokens[split] += len(token_ids)

    def finish(self, tally: Tally, hashes: "array[int]", end: Position, is_last: bool) -> None:
        """Finish the shard; `tally` comes without token counts."""
        with writing(self._path(".hashes")), self._path(".hashes").open("wb") as handle:
            hashes.tofile(handle)
            handle.flush()
            os.fsync(handle.fileno())
        for split, handle in self._files.items():
            with writing(self._path(f".{split}.bin")), handle:
                handle.flush()
                os.fsync(handle.fileno())
        tally.train.tokens, tally.validation.tokens = self._tokens["train"], self._tokens["validation"]
        digests = {split: digest.hexdigest() for split, digest in self._digests.items()}
        record = FinishedShard(tally=tally, sha256=digests, end=end, is_last=is_last)
        write_text(self._path(".json"), json.dumps(asdict(record), indent=1))

    def _path(self, suffix: str) -> Path:
        return self._stem.with_name(self._stem.name + suffix)


def finished_shards(directory: Path) -> list[FinishedShard]:
    """Return the records of the whole shards, up to the first that is not."""
    records: list[FinishedShard] = []
    while (path := directory / f"{len(records):05d}.json").is_file():
        records.append(FinishedShard.read(path))
    return records


def shard_hashes(directory: Path, number: int) -> "array[int]":
    """Return the document hashes of a whole shard of an unfinished source."""
    hashes = array("Q")
    hashes.frombytes((directory / f"{number:05d}.hashes").read_bytes())
    return hashes


def tidy(directory: Path) -> None:
    """Remove what only resuming needs, and what interruptions left."""
    for path in (*directory.glob("*.hashes"), *directory.glob(".*.tmp")):
        path.unlink()
    sync_directory(directory)


class TokenSequence:
    """The ids of several shard files as one sequence (N,), mapped as they are needed; it is small to copy."""

    def __init__(self, files: Sequence[Path], lengths: Sequence[int], dtype: str) -> None:
        filled = [(file, length) for file, length in zip(files, lengths, strict=True) if length]  # no map of nothing
        self.files, self.dtype = [file for file, _ in filled], dtype
        self._ends = np.cumsum([length for _, length in filled], dtype=np.int64)
        self._maps: OrderedDict[int, NDArray[np.integer]] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __add__(self, other: Self) -> Self:
        lengths = np.diff(np.concatenate((self._ends, len(self) + other._ends)), prepend=0)
        return type(self)([*self.files, *other.files], lengths.tolist(), self.dtype)

    def read(self, start: int, length: int) -> NDArray[np.integer]:
        """Return ids `start` to `start + length`, which must exist."""
        shard = int(np.searchsorted(self._ends, start, side="right"))
        parts: list[NDArray[np.integer]] = []
        while length:
            first = start - (int(self._ends[shard - 1]) if shard else 0)
            part = self._map(shard)[first : first + length]
            parts.append(part)
            start, length, shard = start + len(part), length - len(part), shard + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def require_files(self) -> None:
        """Raise DataError when a file is missing or not as long as it was written."""
        width = np.dtype(self.dtype).itemsize
        for file, length in zip(self.files, np.diff(self._ends, prepend=0), strict=True):
            found = file.stat().st_size if file.is_file() else None
            if found != length * width:
                raise DataError(
                    f"{file}: {'missing' if found is None else f'{found} bytes'}, but its index says {length * width} "
                    f"bytes; remove {file.parent} to prepare it again"
                )

    def chunks(self, size: int = 1 << 20) -> Iterator[NDArray[np.integer]]:
        """Yield all ids in order, at most `size` at a time, without mapping them: mapped pages count as memory."""
        width = np.dtype(self.dtype).itemsize
        for file, length in zip(self.files, np.diff(self._ends, prepend=0).tolist(), strict=True):
            for start in range(0, length, size):
                yield np.fromfile(file, self.dtype, count=min(size, length - start), offset=start * width)

    def __getstate__(self) -> dict[str, object]:
        """Leave out the maps: a copy in another process opens its own."""
        return {**self.__dict__, "_maps": OrderedDict()}

    def _map(self, shard: int) -> NDArray[np.integer]:
        if (mapped := self._maps.pop(shard, None)) is None:
            mapped = np.memmap(self.files[shard], dtype=self.dtype, mode="r")
            if len(self._maps) >= _OPEN_SHARDS:
                self._maps.popitem(last=False)
        self._maps[shard] = mapped
        return mapped
