"""The held-out text of a run: the same windows for the callback and for every verb.

Texts beside a run's own that its models are scored on.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from src.data.config import DataConfig, SourceConfig
from src.data.corpus import Document, read_source
from src.data.encoder import PIECE_CHARACTERS, cut_at_line_ends
from src.data.files import source_files
from src.data.packed_corpus import PackedCorpus, prepare_corpus
from src.data.tokenizer import byte_lengths, load_bound_tokenizer, separator_id
from src.data.windows import validation_windows
from src.errors import ConfigError, DataError
from src.run_directory import RunDirectory


@dataclass(frozen=True, kw_only=True)
class EvaluationCorpus:
    """A text to score by perplexity."""

    name: str
    """What reports call it."""
    files: list[str]
    """Paths, folders and globs, as in `data.files`."""
    windows: int = 128
    """Windows of data.sequence_length tokens that are scored: the first ones."""

    def __post_init__(self) -> None:
        """Raise ConfigError on values out of range."""
        if self.windows < 1:
            raise ConfigError(f"evaluation.corpora: {self.name} has windows {self.windows}, but it must be at least 1")


def corpus_windows(corpus: EvaluationCorpus, tokenizer: Tokenizer, sequence_length: int) -> Tensor:
    """Return windows (N, T+1) int64 of a corpus, its documents separated as in training.

    Raises:
        DataError: its files cannot be read, hold a record that is not text, or less than one window.
    """
    source = SourceConfig(name=corpus.name, files=corpus.files)
    wanted, token_ids = corpus.windows * sequence_length + 1, list[int]()
    for document in read_source(source, source_files(source)):
        if isinstance(document, Document):
            for piece in cut_at_line_ends(document.text, PIECE_CHARACTERS):
                token_ids += tokenizer.encode(piece, add_special_tokens=False).ids
                if len(token_ids) >= wanted:
                    break
            token_ids.append(separator_id(tokenizer))
        elif document.problem != "empty":  # a score over other text than was named would be worse than none
            raise DataError(f"evaluation.corpora: {corpus.name}: {document.where}: {document.detail}; correct the text")
        if len(token_ids) >= wanted:
            break
    count = min(corpus.windows, (len(token_ids) - 1) // sequence_length)
    if count < 1:
        raise DataError(
            f"evaluation.corpora: {corpus.name} has {len(token_ids)} tokens, less than one window of "
            f"data.sequence_length {sequence_length} + 1; add text or shorten the window"
        )
    tokens = torch.tensor(token_ids, dtype=torch.int64)
    return tokens.unfold(0, sequence_length + 1, sequence_length)[:count]  # neighbours share one token


def windows_by_source(corpus: PackedCorpus, sequence_length: int, limit: int) -> dict[str, Tensor]:
    """Return held-out windows (N, T+1) of each source of a corpus that has several, where they fill a window.

    Sources of one name are told apart by a number.
    """
    windows: dict[str, Tensor] = {}
    for source in corpus.sources if len(corpus.sources) > 1 else ():
        if source.tally.validation.tokens > sequence_length:
            name, number = Path(source.label).name, 1
            while (key := name if number == 1 else f"{name}-{number}") in windows:
                number += 1
            windows[key] = validation_windows(source.tokens("validation"), sequence_length, limit)
    return windows


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Held-out windows and what is needed to score them."""

    windows: Tensor
    """(N, T+1) int64."""
    byte_lengths: Tensor
    """(V,) int64: UTF-8 bytes that each id stands for."""
    tokenizer: Tokenizer
    corpus_fingerprint: str
    token_counts: Tensor
    """(V,) int64: how often each id occurs in the training text."""
    by_source: dict[str, Tensor]
    """Windows (N, T+1) of each source, where the corpus has several."""
    document_separator: int | None
    """The id that ends documents, where the model keeps them apart; None where it sees whole windows."""

    @property
    def text(self) -> str:
        """The text that the predicted tokens stand for."""
        return "".join(self.tokenizer.decode_batch(self.windows[:, 1:].tolist()))


def held_out(corpus: PackedCorpus, config: DataConfig, vocab_size: int) -> HeldOut:
    """Cut the held-out windows of a prepared corpus for a model of `vocab_size` ids."""
    return HeldOut(
        windows=validation_windows(corpus.tokens("validation"), config.sequence_length, config.validation_windows),
        byte_lengths=byte_lengths(corpus.tokenizer, vocab_size),
        tokenizer=corpus.tokenizer,
        corpus_fingerprint=corpus.fingerprint,
        token_counts=corpus.token_counts(vocab_size),
        by_source=windows_by_source(corpus, config.sequence_length, config.validation_windows),
        document_separator=separator_id(corpus.tokenizer) if config.document_mask else None,
    )


def held_out_of_run(run: RunDirectory, config: DataConfig) -> tuple[HeldOut, str | None]:
    """Prepare a run's held-out windows again, with the run's own tokenizer.

    Returns them and, where the corpus on this machine is not the one the run was trained on, a sentence that says
    so: documents keep their side of the split, but scores are over other text.
    """
    tokenizer = load_bound_tokenizer(run.tokenizer_path, run.recorded_tokenizers())
    corpus = prepare_corpus(config, tokenizer)
    found = held_out(corpus, config, run.model_config().vocab_size)
    recorded = run.recorded_corpus("fingerprint")
    if recorded is None or recorded == corpus.fingerprint:
        return found, None
    return found, (
        f"the corpus on this machine ({corpus.fingerprint[:12]}) is not the one this run was trained on "
        f"({recorded[:12]}), so scores are over other text"
    )
