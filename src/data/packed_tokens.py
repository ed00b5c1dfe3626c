"""A prepared corpus: the tokens of one or several sources with the tokenizer that made them. Knows no windows."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from src.data.cache import PreparedSource, prepare_source
from src.data.config import DataConfig
from src.data.progress import Report, no_report
from src.data.shards import TokenSequence
from src.data.tally import SplitCount
from src.data.tokenizer import fingerprint, require_room
from src.data.tokenizer_choice import choose_tokenizer
from src.errors import DataError


@dataclass(frozen=True, kw_only=True)
class PackedCorpus:
    """Prepared sources; ids are read from disk as they are needed."""

    sources: Sequence[PreparedSource]
    tokenizer: Tokenizer

    @property
    def fingerprint(self) -> str:
        """Hash of all tokens and of the tokenizer: the same text gives the same one wherever it lies."""
        fingerprints = [source.fingerprint for source in self.sources]
        if len(fingerprints) == 1:
            return fingerprints[0]
        return hashlib.sha256(" ".join(fingerprints).encode()).hexdigest()

    @property
    def train(self) -> SplitCount:
        """What all training splits hold."""
        return sum((source.tally.train for source in self.sources), SplitCount())

    @property
    def validation(self) -> SplitCount:
        """What all held-out splits hold."""
        return sum((source.tally.validation for source in self.sources), SplitCount())

    def tokens(self, split: str) -> TokenSequence:
        """Return the ids of `train` or `validation`, source after source."""
        return reduce(add, (source.tokens(split) for source in self.sources))

    def training_streams(self) -> list[tuple[TokenSequence, float]]:
        """Return what training windows are drawn from, and how often: each source, or all as one without weights."""
        weighted = [(source.tokens("train"), source.weight) for source in self.sources if source.weight is not None]
        return weighted or [(self.tokens("train"), 1.0)]

    def facts(self) -> dict[str, object]:
        """Return what a report says of the corpus: no place on this machine, for reports are sent elsewhere."""
        return {
            "fingerprint": self.fingerprint,
            "tokenizer": fingerprint(self.tokenizer),
            "train": asdict(self.train),
            "validation": asdict(self.validation),
            "sources": [_facts(source) for source in self.sources],
        }

    def token_counts(self, vocab_size: int) -> Tensor:
        """Return (V,) int64: how often each id occurs in the training splits."""
        counts = sum((source.token_counts() for source in self.sources), np.zeros(1, dtype=np.int64))
        return torch.from_numpy(np.pad(counts, (0, vocab_size - len(counts))))


def _facts(source: PreparedSource) -> dict[str, object]:
    counts = asdict(source.tally)
    del counts["examples"]  # they name files
    return {"name": Path(source.label).name, **counts}


def prepare_corpus(
    config: DataConfig,
    tokenizer: Tokenizer | None = None,
    *,
    vocab_size: int | None = None,
    report: Report = no_report,
) -> PackedCorpus:
    """Read, split, tokenize and cache the corpus of `config`, or open what the cache has of it.

    Args:
        config: what to read.
        tokenizer: use this one (a run's own) instead of what the config says.
        vocab_size: ids that the model has; a tokenizer with more is refused before any work.
        report: is told how far reading has come.

    Raises:
        DataError: text or tokenizer cannot be used, or a split has no full window.
    """
    if tokenizer is None:
        tokenizer = choose_tokenizer(config, report)
    if vocab_size is not None:
        require_room(tokenizer, vocab_size)
    sources = [prepare_source(source, config, tokenizer, report) for source in config.all_sources()]
    corpus = PackedCorpus(sources=sources, tokenizer=tokenizer)
    _require_windows(corpus, config)
    return corpus


def _require_windows(corpus: PackedCorpus, config: DataConfig) -> None:
    for split, sources in (("train", _drawn_from(corpus)), ("validation", [(corpus.validation, "the corpus")])):
        for count, label in sources:
            if not count.documents:
                raise DataError(
                    f"data: the {split} split of {label} has no document with text in it; add documents or change "
                    f"data.validation_fraction ({config.validation_fraction})"
                )
            if count.tokens <= config.sequence_length:
                raise DataError(
                    f"data: the {split} split of {label} has {count.tokens} tokens, less than one window of "
                    f"data.sequence_length {config.sequence_length} + 1; add text or shorten the window"
                )


def _drawn_from(corpus: PackedCorpus) -> list[tuple[SplitCount, str]]:
    weighted = [(source.tally.train, source.label) for source in corpus.sources if source.weight is not None]
    return weighted or [(corpus.train, "the corpus")]
