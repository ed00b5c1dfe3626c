"""Tokenized sources on disk. An entry is a directory that appears whole: shards, `counts.npy` and `index.json`.

Its name is a hash of everything that its contents follow from, so changed inputs make another entry. Until it is
whole it is called `<name>.building`, and can be resumed.
"""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from src.data.config import DataConfig, SourceConfig
from src.data.encoder import token_dtype
from src.data.files import inputs_of, source_files
from src.data.preparation import prepare_shards
from src.data.progress import Report
from src.data.shards import SPLITS, ShardRecord, TokenSequence
from src.data.tally import Tally, total
from src.data.tokenizer import fingerprint, require_same, vocabulary_size
from src.errors import DataError
from src.files import sync_directory, write_text

_VERSION = 2
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
    tally: Tally
    shard_tokens: tuple[dict[str, int], ...]
    """Per shard, ids of each split."""

    def tokens(self, split: str) -> TokenSequence:
        """Return the ids of `train` or `validation`."""
        files = [self.path / f"{number:05d}.{split}.bin" for number in range(len(self.shard_tokens))]
        return TokenSequence(files, [shard[split] for shard in self.shard_tokens], self.dtype)

    def token_counts(self) -> NDArray[np.int64]:
        """Return (ids,): how often each id of the tokenizer occurs in the training split."""
        return np.load(self.path / "counts.npy")


def prepare_source(source: SourceConfig, config: DataConfig, tokenizer: Tokenizer, report: Report) -> PreparedSource:
    """Tokenize a source, or open its entry if the cache has it.

    Raises:
        DataError: the source cannot be read, is over a budget, or its files change meanwhile.
    """
    files = source_files(source)
    key = entry_key(source, files, config, f"{fingerprint(tokenizer)} {config.shard_mb} {config.duplicate_memory_mb}")
    target = Path(config.cache_dir) / key
    if not (target / _INDEX).is_file():
        with exclusive(target.with_suffix(".lock")):
            if not (target / _INDEX).is_file():
                building = target.with_suffix(".building")
                before = inputs_of(files)
                records = prepare_shards(building, source, files, tokenizer, config, report)
                _require_unchanged(before, inputs_of(files), source, building)
                _write_index(building, records, tokenizer)
                building.replace(target)
                sync_directory(target.parent)
    return _open(target, source, tokenizer)


def entry_key(source: SourceConfig, files: Sequence[Path], config: DataConfig, recipe: str) -> str:
    """Return a name for what follows from a source, its files as they are, the split and `recipe`."""
    content = {key: value for key, value in asdict(source).items() if key not in _NOT_CONTENT}
    if source.hub is None:
        del content["files"]  # the files themselves count, not the pattern that found them
    facts = [_VERSION, content, inputs_of(files), config.validation_fraction, config.seed, recipe]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


@contextmanager
def exclusive(path: Path) -> Generator[None]:
    """Hold a lock file, so that of two processes that prepare the same thing the second waits and finds it done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _write_index(directory: Path, records: Sequence[ShardRecord], tokenizer: Tokenizer) -> None:
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
    np.save(directory / "counts.npy", counts)
    write_text(directory / _INDEX, json.dumps(index, indent=1))


def _open(path: Path, source: SourceConfig, tokenizer: Tokenizer) -> PreparedSource:
    index = json.loads((path / _INDEX).read_text(encoding="utf-8"))
    require_same(index["tokenizer"], str(path), fingerprint(tokenizer), "data.tokenizer")
    prepared = PreparedSource(
        label=source.label,
        weight=source.weight,
        path=path,
        fingerprint=index["fingerprint"],
        dtype=index["dtype"],
        tally=Tally.from_dict(index["tally"]),
        shard_tokens=tuple(index["shard_tokens"]),
    )
    for split in SPLITS:
        prepared.tokens(split).require_files()
    return prepared


def _require_unchanged(before: object, after: object, source: SourceConfig, building: Path) -> None:
    if before != after:
        shutil.rmtree(building)  # it holds a bit of both
        raise DataError(f"{source.label}: its files changed while they were read; run again when they are at rest")
