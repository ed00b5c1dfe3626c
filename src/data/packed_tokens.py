"""A tokenized corpus on disk, memory-mapped, and windows of it as a pure function of (seed, step).

A cache entry is a directory that appears whole: `tokenizer.json`, `train.bin`, `validation.bin` (little-endian
uint16 or uint32 ids, documents separated by the end-of-text id) and `index.json`.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from src.data.config import DataConfig
from src.data.corpus import Document, is_held_out, read_documents
from src.data.tokenizer import END_OF_TEXT, fingerprint, load_tokenizer, train_bpe
from src.errors import DataError

_CACHE_VERSION = 1
_BATCH_DOCUMENTS = 64


@dataclass(frozen=True, kw_only=True)
class SplitStats:
    """What one split holds."""

    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class PackedCorpus:
    """A prepared corpus; ids are read from disk as they are needed."""

    path: Path
    fingerprint: str
    tokenizer: Tokenizer
    train: SplitStats
    validation: SplitStats
    dtype: str

    def tokens(self, split: str) -> NDArray[np.integer]:
        """Map the ids of `train` or `validation`."""
        return np.memmap(self.path / f"{split}.bin", dtype=self.dtype, mode="r")

    def facts(self) -> dict[str, object]:
        """Return what a report says of the corpus."""
        return {
            "fingerprint": self.fingerprint,
            "tokenizer": fingerprint(self.tokenizer),
            "train": asdict(self.train),
            "validation": asdict(self.validation),
        }

    def token_counts(self, vocab_size: int) -> Tensor:
        """Return (V,) int64: how often each id occurs in the training split."""
        return torch.from_numpy(np.bincount(self.tokens("train"), minlength=vocab_size).astype(np.int64))


def prepare_corpus(config: DataConfig, tokenizer: Tokenizer | None = None) -> PackedCorpus:
    """Read, split, tokenize and cache the corpus of `config`, or open it if the cache has it.

    Args:
        config: what to read.
        tokenizer: use this one (a run's own) instead of what the config says.

    Raises:
        DataError: files cannot be read, or a split has no full window.
    """
    documents = list(read_documents(config.files))
    held_out = [is_held_out(document, config.validation_fraction, config.seed) for document in documents]
    training = [document for document, out in zip(documents, held_out, strict=True) if not out]
    validation = [document for document, out in zip(documents, held_out, strict=True) if out]
    _require_documents(training, validation, config)
    if tokenizer is None and config.tokenizer.path is not None:
        tokenizer = load_tokenizer(Path(config.tokenizer.path))
    recipe = f"bpe {config.tokenizer.vocab_size}" if tokenizer is None else fingerprint(tokenizer)
    key = _cache_key(training, validation, recipe)
    target = Path(config.cache_dir) / key[:32]
    with _exclusive(target.with_suffix(".lock")):
        if not (target / "index.json").is_file():
            _write_entry(target, key, training, validation, tokenizer, config.tokenizer.vocab_size)
    corpus = _open_entry(target)
    for split, stats in (("train", corpus.train), ("validation", corpus.validation)):
        if stats.tokens <= config.sequence_length:
            raise DataError(
                f"data: the {split} split has {stats.tokens} tokens, less than one window of data.sequence_length "
                f"{config.sequence_length} + 1; add text or shorten the window"
            )
    return corpus


def training_windows(
    tokens: NDArray[np.integer], sequence_length: int, samples: NDArray[np.int64], seed: int
) -> Tensor:
    """Return windows (N, T+1) int64 for sample numbers (N,) of an endless shuffled stream.

    Sample i is window `permutation_e(i mod n)` of epoch e = i div n, where n is the number of windows; so every
    window is seen once per epoch, and position, order and resumption depend on (seed, i) alone.
    """
    num_windows = (len(tokens) - 1) // sequence_length
    windows = np.empty_like(samples)
    for epoch in np.unique(samples // num_windows):
        of_epoch = samples // num_windows == epoch
        windows[of_epoch] = permute(samples[of_epoch] % num_windows, num_windows, key=(seed, int(epoch)))
    return _cut(tokens, sequence_length, windows)


def validation_windows(tokens: NDArray[np.integer], sequence_length: int, limit: int) -> Tensor:
    """Return at most `limit` windows (N, T+1) int64, evenly spaced over the split: always the same ones."""
    num_windows = (len(tokens) - 1) // sequence_length
    chosen = np.linspace(0, num_windows, num=min(limit, num_windows), endpoint=False).astype(np.int64)
    return _cut(tokens, sequence_length, chosen)


def permute(index: NDArray[np.int64], size: int, key: tuple[int, int]) -> NDArray[np.int64]:
    """Map each of [0, size) to another, one to one: a keyed Feistel network, so no permutation is ever stored."""
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half_bits) - 1)
    round_keys = np.random.default_rng(key).integers(1 << 63, size=4, dtype=np.uint64)
    value = index.astype(np.uint64)
    outside = np.ones(len(value), dtype=bool)
    while outside.any():  # walk the cycle until back inside [0, size)
        left, right = value[outside] >> np.uint64(half_bits), value[outside] & mask
        for round_key in round_keys:
            left, right = right, left ^ (_scramble(right ^ round_key) & mask)
        value[outside] = (left << np.uint64(half_bits)) | right
        outside = value >= size
    return value.astype(np.int64)


def _scramble(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)  # splitmix64's finalizer
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _cut(tokens: NDArray[np.integer], sequence_length: int, windows: NDArray[np.int64]) -> Tensor:
    starts = windows * sequence_length
    positions = starts[:, None] + np.arange(sequence_length + 1)  # (N, T+1); neighbours share one token
    return torch.from_numpy(tokens[positions].astype(np.int64))


def _require_documents(training: Sequence[Document], validation: Sequence[Document], config: DataConfig) -> None:
    for split, documents in (("training", training), ("validation", validation)):
        if not documents:
            raise DataError(
                f"data: the {split} split has no document with text in it; add documents or change "
                f"data.validation_fraction ({config.validation_fraction})"
            )


def _cache_key(training: Sequence[Document], validation: Sequence[Document], recipe: str) -> str:
    digest = hashlib.sha256(f"{_CACHE_VERSION} {recipe}".encode())
    for split in (training, validation):
        digest.update(b"\n")
        for document in split:
            digest.update(document.content_hash.encode())
    return digest.hexdigest()


def _write_entry(
    target: Path,
    key: str,
    training: Sequence[Document],
    validation: Sequence[Document],
    tokenizer: Tokenizer | None,
    vocab_size: int,
) -> None:
    if tokenizer is None:
        tokenizer = train_bpe((document.text for document in training), vocab_size)
    building = target.with_suffix(".building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    tokenizer.save(str(building / "tokenizer.json"))
    dtype = "<u2" if tokenizer.get_vocab_size() <= 2**16 else "<u4"
    index = {
        "fingerprint": key,
        "dtype": dtype,
        "train": asdict(_write_split(building / "train.bin", training, tokenizer, dtype)),
        "validation": asdict(_write_split(building / "validation.bin", validation, tokenizer, dtype)),
    }
    (building / "index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    building.replace(target)


def _write_split(path: Path, documents: Sequence[Document], tokenizer: Tokenizer, dtype: str) -> SplitStats:
    separator, num_tokens = tokenizer.token_to_id(END_OF_TEXT), 0
    with path.open("wb") as handle:
        for start in range(0, len(documents), _BATCH_DOCUMENTS):
            texts = [document.text for document in documents[start : start + _BATCH_DOCUMENTS]]
            for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                token_ids = np.asarray([*encoding.ids, separator], dtype=dtype)
                num_tokens += len(token_ids)
                handle.write(token_ids.tobytes())
        handle.flush()
        os.fsync(handle.fileno())
    num_bytes = sum(len(document.text.encode()) for document in documents)
    return SplitStats(documents=len(documents), tokens=num_tokens, bytes=num_bytes)


def _open_entry(path: Path) -> PackedCorpus:
    index = json.loads((path / "index.json").read_text(encoding="utf-8"))
    return PackedCorpus(
        path=path,
        fingerprint=index["fingerprint"],
        tokenizer=load_tokenizer(path / "tokenizer.json"),
        train=SplitStats(**index["train"]),
        validation=SplitStats(**index["validation"]),
        dtype=index["dtype"],
    )


@contextmanager
def _exclusive(path: Path) -> Generator[None]:
    """Hold a lock file, so that of two processes that prepare the same corpus the second waits and finds it done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
