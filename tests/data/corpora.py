"""Small corpora on disk, in every format, and what a prepared corpus says it holds."""

import gzip
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from src.data.config import DataConfig, SourceConfig, TokenizerConfig
from src.data.packed_corpus import PackedCorpus
from tests.conftest import STDLIB


def sentences(count: int, seed: int = 0, words: int = 30) -> list[str]:
    """Return `count` different documents of plain words."""
    generator = random.Random(seed)
    vocabulary = ["a", "table", "of", "rows", "lies", "on", "disk", "naïve", "日本", "and", "waits", "\n"]
    return [
        f"document {seed}.{number}: " + " ".join(generator.choices(vocabulary, k=words)) + "\n"
        for number in range(count)
    ]


def json_lines(texts: Sequence[str]) -> bytes:
    return b"".join(json.dumps({"id": number, "text": text}).encode() + b"\n" for number, text in enumerate(texts))


def write_parquet(path: Path, texts: Sequence[str | None], column: str = "text") -> Path:
    rows = pyarrow.table({"id": list(range(len(texts))), column: pyarrow.array(texts, pyarrow.string())})
    pyarrow.parquet.write_table(rows, path, row_group_size=16)
    return path


def write_as(name: str, folder: Path, texts: Sequence[str]) -> Path:
    """Write `texts` in the format that the ending of `name` says."""
    path = folder / name
    if name.endswith(".parquet"):
        return write_parquet(path, texts)
    raw = json.dumps([{"text": text} for text in texts], indent=1).encode() if ".json." in f"{name}." else b""
    raw = raw or json_lines(texts)
    if name.endswith(".gz"):
        raw = gzip.compress(raw)
    elif name.endswith(".zst"):
        raw = pyarrow.compress(raw, "zstd", asbytes=True)
    path.write_bytes(raw)
    return path


def config_for(cache_dir: Path, *sources: SourceConfig, **changes: object) -> DataConfig:
    """A config of small windows whose tokenizer has 300 entries."""
    config = DataConfig(
        sources=list(sources),
        tokenizer=TokenizerConfig(vocab_size=300),
        sequence_length=16,
        global_batch_size=8,
        micro_batch_size=2,
        validation_fraction=0.2,
        prepare_processes=1,
        cache_dir=str(cache_dir),
    )
    return replace(config, **changes)  # pyright: ignore[reportArgumentType]


def documents_of(corpus: PackedCorpus, split: str) -> list[str]:
    """Decode a split back into its documents."""
    tokens = np.concatenate([*corpus.tokens(split).chunks()])
    ends = np.flatnonzero(tokens == corpus.rule.separator) + 1
    return [corpus.rule.plain.decode(piece.tolist()) for piece in np.split(tokens, ends) if len(piece)]


def all_documents(corpus: PackedCorpus) -> list[str]:
    return [*documents_of(corpus, "train"), *documents_of(corpus, "validation")]


def stdlib_config(cache_dir: Path) -> DataConfig:
    """Two packages of the standard library in windows of 32."""
    return DataConfig(
        files=[f"{STDLIB}/json/*.py", f"{STDLIB}/email/*.py"],
        tokenizer=TokenizerConfig(vocab_size=400),
        sequence_length=32,
        global_batch_size=8,
        micro_batch_size=2,
        validation_fraction=0.2,
        cache_dir=str(cache_dir),
    )
