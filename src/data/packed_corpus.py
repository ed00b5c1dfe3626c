"""A prepared corpus: the tokens of one or several sources and the tokenizer that made them. Knows no windows.

The tokenizer is loaded, downloaded, or trained on the corpus once and kept in its cache.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from src.data.cache import PreparedSource, entry_key, exclusive, prepare_source
from src.data.config import DataConfig, SourceConfig
from src.data.corpus import Document, read_source, sides
from src.data.files import source_files
from src.data.shards import SplitCount, TokenSequence
from src.data.text_rule import SEPARATORS, TextRule, training_rule
from src.data.tokenizer import fingerprint, load_hub_tokenizer, load_tokenizer, require_room, train_bpe
from src.errors import DataError, caused_by
from src.system.console import Reading, ShowReading, print_note, show_nothing
from src.system.files import write_text

_FEW_DOCUMENTS = 100
_TOKEN_BYTES = 8
"""More than a token of text has on average: this much for each token of a window fills the window."""
_SMALL = 4
"""How much a compressed file may expand; a source smaller than its budget divided by this is read whole."""


def choose_rule(config: DataConfig, report: ShowReading, held_out_parts: Sequence[float] = ()) -> TextRule:
    """Return the rule of a new run, with the tokenizer that `config.tokenizer` names, trained if it names none.

    `held_out_parts` are as in `corpus.sides`, one for each source; none are 0.

    Raises:
        DataError: it cannot be loaded or downloaded, or lacks the token that is to separate documents.
    """
    if config.tokenizer.path is not None:
        path = config.tokenizer.path
        with caused_by("data.tokenizer.path"):
            return training_rule(load_tokenizer(Path(path)), path, config.tokenizer.separator)
    if config.tokenizer.hub is not None:
        name = config.tokenizer.hub
        return training_rule(load_hub_tokenizer(name), name, config.tokenizer.separator)
    return training_rule(_trained_tokenizer(config, report, held_out_parts), "BPE", config.tokenizer.separator)


def _trained_tokenizer(config: DataConfig, report: ShowReading, held_out_parts: Sequence[float]) -> Tokenizer:
    sources = config.all_sources()
    files = [source_files(source, config.files_key) for source in sources]
    parts = held_out_parts or [0.0] * len(sources)
    path = Path(config.cache_dir) / f"tokenizer-{_key(config, sources, files, parts)}.json"
    if not path.is_file():
        with exclusive(path.with_suffix(".lock")):
            if not path.is_file():
                report(Reading("training a tokenizer", 0, 1, "steps"))
                texts = _training_texts(config, sources, files, parts)
                separator = config.tokenizer.separator or SEPARATORS[0]
                write_text(path, train_bpe(texts, config.tokenizer.vocab_size, separator).to_str(pretty=True))
                report(Reading("training a tokenizer", 1, 1, "steps"))
    return load_tokenizer(path)


def _key(
    config: DataConfig, sources: Sequence[SourceConfig], files: Sequence[list[Path]], parts: Sequence[float]
) -> str:
    recipe = f"bpe {config.tokenizer.vocab_size} {config.tokenizer.training_mb}" + (f" {parts}" if any(parts) else "")
    recipe += f" {config.tokenizer.separator}" if config.tokenizer.separator is not None else ""
    keys = [entry_key(source, paths, config, recipe) for source, paths in zip(sources, files, strict=True)]
    return keys[0] if len(keys) == 1 else entry_key(sources[0], [], config, json.dumps(keys))


def _training_texts(
    config: DataConfig, sources: Sequence[SourceConfig], files: Sequence[list[Path]], parts: Sequence[float]
) -> Iterator[str]:
    """Yield training documents, at most `training_mb` of text, in equal parts from sources and from their files."""
    budget = config.tokenizer.training_mb * 10**6 // len(sources)
    for source, paths, held_out_part in zip(sources, files, parts, strict=True):
        stored = sum(path.stat().st_size for path in paths)
        share = budget if source.hub is not None or stored * _SMALL <= budget else budget // len(paths)
        left = budget
        for part in [paths] if source.hub is not None else [[path] for path in paths]:
            taken = 0
            for text in _training_documents(source, part, config, held_out_part):
                taken += len(text)
                yield text
                if taken >= min(share, left):
                    break
            left -= taken
            if left <= 0:
                break


def _training_documents(
    source: SourceConfig, files: list[Path], config: DataConfig, held_out_part: float
) -> Iterator[str]:
    for item in read_source(source, files):
        if isinstance(item, Document):
            yield from (text for text, is_out in sides(item, item.content_hash, config, held_out_part) if not is_out)


@dataclass(frozen=True, kw_only=True)
class PackedCorpus:
    """Prepared sources; ids are read from disk as they are needed."""

    sources: Sequence[PreparedSource]
    rule: TextRule

    @property
    def tokenizer(self) -> Tokenizer:
        return self.rule.tokenizer

    @property
    def fingerprint(self) -> str:
        """Hash of all tokens and of the tokenizer; it does not depend on where the text is stored."""
        fingerprints = [source.fingerprint for source in self.sources]
        if len(fingerprints) == 1:
            return fingerprints[0]
        return hashlib.sha256(" ".join(fingerprints).encode()).hexdigest()

    @property
    def train(self) -> SplitCount:
        """Size of all training splits."""
        return sum((source.tally.train for source in self.sources), SplitCount())

    @property
    def validation(self) -> SplitCount:
        """Size of all held-out splits."""
        return sum((source.tally.validation for source in self.sources), SplitCount())

    def tokens(self, split: str) -> TokenSequence:
        """Return the ids of a split, `train` or `validation` (held out), source after source."""
        return reduce(add, (source.tokens(split) for source in self.sources))

    def training_streams(self) -> list[tuple[TokenSequence, float]]:
        """Return what training windows are drawn from, and its weight: each source, or without weights all as one."""
        weighted = [(source.tokens("train"), source.weight) for source in self.sources if source.weight is not None]
        return weighted or [(self.tokens("train"), 1.0)]

    def facts(self) -> dict[str, object]:
        """Return what a report says of the corpus; no paths, because reports are published."""
        return {
            "fingerprint": self.fingerprint,
            "tokenizer": fingerprint(self.tokenizer),
            "text_rule": self.rule.record(),
            "train": asdict(self.train),
            "validation": asdict(self.validation),
            "sources": [_facts(source) for source in self.sources],
        }

    def token_counts(self, vocab_size: int) -> Tensor:
        """Return (V,) int64: occurrences of each id in the training splits."""
        counts = sum((source.token_counts() for source in self.sources), np.zeros(1, dtype=np.int64))
        return torch.from_numpy(np.pad(counts, (0, vocab_size - len(counts))))


def _facts(source: PreparedSource) -> dict[str, object]:
    counts = asdict(source.tally)
    del counts["examples"]  # they name files
    if source.held_out_part:
        counts["held_out_part"] = source.held_out_part
    return {"name": Path(source.label).name, **counts}


def prepare_corpus(
    config: DataConfig,
    rule: TextRule | None = None,
    *,
    vocab_size: int | None = None,
    report: ShowReading = show_nothing,
) -> PackedCorpus:
    """Read, split, tokenize and cache the corpus of `config`, or open the parts that are cached.

    Whole documents are held out. Where that leaves a split without a full window, because documents are few, the last
    part of each document is held out instead.

    Args:
        config: what to read.
        rule: use this one (a run's own), with its tokenizer, instead of what the config says.
        vocab_size: ids that the model has; a tokenizer with more is refused before any work.
        report: called with the progress of reading.

    Raises:
        DataError: text or tokenizer cannot be used, or a split has no full window.
    """
    chosen = choose_rule(config, report) if rule is None else rule
    if vocab_size is not None:
        require_room(chosen.tokenizer, vocab_size)
    corpus = _prepare(config, chosen, report, [0.0] * len(config.all_sources()))
    if parts := _held_out_parts(corpus, config):
        if rule is None and config.tokenizer.is_trained_here:  # on the training parts; they alone decide the rest
            return prepare_corpus(config, choose_rule(config, report, parts), vocab_size=vocab_size, report=report)
        corpus = _prepare(config, chosen, report, parts)
        print_note(
            f"the corpus has too few documents to hold out whole ones, so the last {max(parts):.1%} of each document "
            "is held out"
        )
    _require_windows(corpus, config)
    return corpus


def _prepare(config: DataConfig, rule: TextRule, report: ShowReading, parts: Sequence[float]) -> PackedCorpus:
    sources = [
        prepare_source(source, config, rule, report, part)
        for source, part in zip(config.all_sources(), parts, strict=True)
    ]
    return PackedCorpus(sources=sources, rule=rule)


def _held_out_parts(corpus: PackedCorpus, config: DataConfig) -> list[float]:
    """Return for each source the part of its documents to hold out, where whole ones fill no window of a split."""

    def lacks(count: SplitCount) -> bool:
        return count.tokens <= config.sequence_length

    together = lacks(corpus.validation) or (corpus.sources[0].weight is None and lacks(corpus.train))
    few = [together or (source.weight is not None and lacks(source.tally.train)) for source in corpus.sources]
    both = [source.tally.train + source.tally.validation for source in corpus.sources]
    counts = sum((count for count, is_few in zip(both, few, strict=True) if is_few), SplitCount())
    if not 0 < counts.documents <= _FEW_DOCUMENTS:
        return []
    window_bytes = _TOKEN_BYTES * (config.sequence_length + 1)
    part = max(config.validation_fraction, min(0.5, window_bytes / counts.bytes))
    return [part if is_few else 0.0 for is_few in few]


def _require_windows(corpus: PackedCorpus, config: DataConfig) -> None:
    for split, sources in (("train", _drawn_from(corpus)), ("validation", [(corpus.validation, "the corpus")])):
        for count, label in sources:
            if not count.documents:
                raise DataError(
                    f"data: the {split} split of {label} has no document with text in it; add documents, or change "
                    f"data.validation_fraction ({config.validation_fraction}) if they are many"
                )
            if count.tokens <= config.sequence_length:
                raise DataError(
                    f"data: the {split} split of {label} has {count.tokens} tokens, less than one window of "
                    f"data.sequence_length {config.sequence_length} + 1; add text or shorten the window"
                )


def _drawn_from(corpus: PackedCorpus) -> list[tuple[SplitCount, str]]:
    weighted = [(source.tally.train, source.label) for source in corpus.sources if source.weight is not None]
    return weighted or [(corpus.train, "the corpus")]
