"""The cache of tokenized sources: opens an entry, or prepares it and resumes where it stopped.

An entry is a directory that appears whole: shards, `counts.npy` and `index.json`. Its name is a hash of everything that
its contents depend on, so changed inputs make another entry. Until it is whole it is called `<name>.building`.

To prepare a source is to read, deduplicate, split and tokenize its documents and to write shards. Neither the number of
processes nor an interruption changes a byte. This process reads and writes; other processes tokenize.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from src.data.batches import BatchPlanner
from src.data.config import DataConfig, SourceConfig
from src.data.encoder import token_dtype
from src.data.encoder_pool import encode_in_order
from src.data.files import inputs_of, source_files, unknown_formats
from src.data.records import hub_rows
from src.data.shards import (
    SPLITS,
    FinishedShard,
    ShardWriter,
    Tally,
    TokenSequence,
    finished_shards,
    require_within_budgets,
    tidy,
    total,
)
from src.data.text_rule import TextRule
from src.data.tokenizer import fingerprint, require_same, vocabulary_size
from src.errors import DataError
from src.system.console import Reading, ShowReading, print_note
from src.system.files import atomic_path, sync_directory, write_text
from src.system.locks import lock, note_missing_locks
from src.system.ranks import ranks_started_together


def prepare_shards(
    directory: Path,
    source: SourceConfig,
    files: Sequence[Path],
    rule: TextRule,
    config: DataConfig,
    report: ShowReading,
    held_out_part: float = 0.0,
) -> list[FinishedShard]:
    """Write the shards of `source` that `directory` lacks, and return the records of all shards.

    Raises:
        DataError: a file cannot be read, or more records are skipped than the budgets allow.
    """
    directory.mkdir(parents=True, exist_ok=True)
    finished = finished_shards(directory)
    if not finished or not finished[-1].is_last:
        planner = BatchPlanner(source, files, config, finished, directory, held_out_part)
        _write_shards(planner, directory, rule, processes(config), _SourceProgress(source, files, report))
        finished = finished_shards(directory)
    require_within_budgets(total(record.tally for record in finished), config, source.label, at_end=True)
    tidy(directory)
    return finished


def processes(config: DataConfig) -> int:
    """Return the number of processes that tokenize."""
    if config.prepare_processes is not None:
        return config.prepare_processes
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _write_shards(
    planner: BatchPlanner, directory: Path, rule: TextRule, workers: int, progress: "_SourceProgress"
) -> None:
    writer: ShardWriter | None = None
    for batch, encoded in encode_in_order(planner, lambda batch: batch.texts, rule, workers):
        writer = writer or ShardWriter(directory, batch.shard)
        writer.write(encoded, np.asarray(batch.held_out, dtype=bool))
        if batch.closing is not None:
            writer.finish(*batch.closing)
            writer = None
        progress.advance_to(batch.file, batch.offset)


class _SourceProgress:
    """Reports a position in a source, in bytes of its files or rows of a hub dataset."""

    def __init__(self, source: SourceConfig, files: Sequence[Path], report: ShowReading) -> None:
        self._label, self._report = source.label, report
        sizes = [0] if source.hub is not None else [path.stat().st_size for path in files]
        self._before = list(accumulate(sizes, initial=0))
        self._unit = "bytes" if source.hub is None else "rows"
        self._total = self._before[-1] if source.hub is None else hub_rows(source)

    def advance_to(self, file: int, offset: int) -> None:
        self._report(Reading(self._label, self._before[file] + offset, self._total, self._unit))


_VERSION = 4
"""Of the rules by which files become ids; entries made by others are prepared again."""
_INDEX = "index.json"
_NOT_CONTENT = ("name", "weight")


@dataclass(frozen=True, kw_only=True)
class PreparedSource:
    """A source's tokens on disk."""

    label: str
    weight: float | None
    path: Path
    fingerprint: str
    """Hash of its tokens and of the tokenizer they were made with."""
    dtype: str
    held_out_part: float
    """Share at the end of each document that is held out; 0 where whole documents are."""
    tally: Tally
    shard_tokens: tuple[dict[str, int], ...]
    """Per shard, ids of each split."""

    def tokens(self, split: str) -> TokenSequence:
        """Return the ids of a split, `train` or `validation` (held out)."""
        files = [self.path / f"{number:05d}.{split}.bin" for number in range(len(self.shard_tokens))]
        return TokenSequence(files, [shard[split] for shard in self.shard_tokens], self.dtype)

    def token_counts(self) -> NDArray[np.int64]:
        """Return (ids,): occurrences of each id of the tokenizer in the training split."""
        return np.load(self.path / "counts.npy")


def prepare_source(
    source: SourceConfig, config: DataConfig, rule: TextRule, report: ShowReading, held_out_part: float = 0.0
) -> PreparedSource:
    """Tokenize a source, or open its entry if the cache has it; `held_out_part` is as in `corpus.sides`.

    Raises:
        DataError: the source cannot be read, is over a budget, or its files change while they are read.
    """
    files = source_files(source, config.files_key)
    recipe = f"{fingerprint(rule.tokenizer)} {config.shard_mb} {config.duplicate_memory_mb}"
    recipe += "" if rule.is_default else f" {rule.separator} {rule.before} {rule.after}"
    key = entry_key(source, files, config, f"{recipe} parts {held_out_part}" if held_out_part else recipe)
    target = Path(config.cache_dir) / key
    if not (target / _INDEX).is_file():
        with exclusive(target.with_suffix(".lock")):
            if not (target / _INDEX).is_file():
                building = target.with_suffix(".building")
                _name_unknown(unknown_formats(files) if source.files else [])
                before = inputs_of(files)
                records = prepare_shards(building, source, files, rule, config, report, held_out_part)
                _require_unchanged(before, inputs_of(files), source, building)
                _write_index(building, records, rule.tokenizer)
                building.replace(target)
                sync_directory(target.parent)
    return _open(target, source, rule.tokenizer, held_out_part)


def _name_unknown(files: Sequence[Path]) -> None:
    if files:
        rest = f" and {len(files) - 1} more" if len(files) > 1 else ""
        print_note(f"read as text, because their endings are unknown: {files[0]}{rest}")


def entry_key(source: SourceConfig, files: Sequence[Path], config: DataConfig, recipe: str) -> str:
    """Return a name for what depends on a source, its files as they are, the split and `recipe`."""
    content = {key: value for key, value in asdict(source).items() if key not in _NOT_CONTENT}
    if source.hub is None:
        del content["files"]  # the files themselves count, not the pattern that found them
    facts = [_VERSION, content, inputs_of(files), config.validation_fraction, config.seed, recipe]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


@contextmanager
def exclusive(path: Path) -> Generator[None]:
    """Hold a lock file: of two processes that prepare the same thing, the second waits and finds it done.

    DataError where there are no locks and several ranks may be here at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        if not lock(handle.fileno(), wait=True):
            if ranks_started_together() > 1:
                raise DataError(
                    f"data.cache_dir: {path.parent} is on a file system without file locks (flock), which several "
                    "ranks need to prepare a corpus; run `python -m src.prepare_data` with this config first, or name "
                    "a directory on a local disk"
                )
            note_missing_locks()
        yield


def _write_index(directory: Path, records: Sequence[FinishedShard], tokenizer: Tokenizer) -> None:
    shard_tokens = [{split: getattr(record.tally, split).tokens for split in SPLITS} for record in records]
    identity = [fingerprint(tokenizer), token_dtype(tokenizer), *(record.sha256 for record in records)]
    index = {
        "fingerprint": hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        "tokenizer": fingerprint(tokenizer),
        "dtype": token_dtype(tokenizer),
        "tally": asdict(total(record.tally for record in records)),
        "shard_tokens": shard_tokens,
    }
    files = [directory / f"{number:05d}.train.bin" for number in range(len(records))]
    training = TokenSequence(files, [tokens["train"] for tokens in shard_tokens], token_dtype(tokenizer))
    counts = np.zeros(vocabulary_size(tokenizer), dtype=np.int64)
    for chunk in training.chunks():
        counts += np.bincount(chunk, minlength=len(counts))
    counts_file = io.BytesIO()
    np.save(counts_file, counts)
    with atomic_path(directory / "counts.npy") as temporary:
        temporary.write_bytes(counts_file.getvalue())
    write_text(directory / _INDEX, json.dumps(index, indent=1))


def _open(path: Path, source: SourceConfig, tokenizer: Tokenizer, held_out_part: float) -> PreparedSource:
    index = json.loads((path / _INDEX).read_text(encoding="utf-8"))
    require_same(index["tokenizer"], str(path), fingerprint(tokenizer), "data.tokenizer")
    prepared = PreparedSource(
        label=source.label,
        weight=source.weight,
        path=path,
        fingerprint=index["fingerprint"],
        dtype=index["dtype"],
        held_out_part=held_out_part,
        tally=Tally.from_dict(index["tally"]),
        shard_tokens=tuple(index["shard_tokens"]),
    )
    for split in SPLITS:
        prepared.tokens(split).require_files()
    return prepared


def _require_unchanged(before: object, after: object, source: SourceConfig, building: Path) -> None:
    if before != after:
        shutil.rmtree(building)  # it holds a bit of both
        raise DataError(f"{source.label}: its files changed while they were read; run again when they no longer change")
