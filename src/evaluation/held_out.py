"""The held-out text of a run: windows cut once, kept in the run, and scored alike by the callback and every verb.

`held_out.safetensors` in a run directory holds all that scoring needs, so that no verb reads the corpus again.

N windows, T tokens, V vocabulary.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from src.data.config import DataConfig, SourceConfig
from src.data.corpus import Document, read_source
from src.data.files import source_files
from src.data.packed_corpus import PackedCorpus, prepare_corpus
from src.data.text_rule import TextRule
from src.data.tokenizer import byte_lengths, load_run_rule
from src.data.windows import held_out_windows
from src.errors import ConfigError, DataError, RunError
from src.evaluation.perplexity import RowsOf, Score, Share, summarize, window_losses
from src.model import Transformer
from src.model.attention import document_mask
from src.run_directory import RunDirectory, read_metadata, read_tensors, write_tensors
from src.system.console import Advance, no_advance
from src.system.files import naming

HELD_OUT = "held_out"
"""The name of a run's own held-out text among corpora."""


@dataclass(frozen=True, kw_only=True)
class EvaluationCorpus:
    """Another text to score by perplexity."""

    name: str
    """What reports call it."""
    files: list[str]
    """Paths, folders and globs, as in `data.files`."""
    windows: int = 128
    """Windows of data.sequence_length tokens that are scored: the first ones."""

    def __post_init__(self) -> None:
        if not self.files:
            raise ConfigError(f"evaluation.corpora: {self.name} has no files; name some, or leave it out")
        if self.windows < 1:
            raise ConfigError(f"evaluation.corpora: {self.name} has windows {self.windows}, but it must be at least 1")


def corpus_windows(corpus: EvaluationCorpus, rule: TextRule, sequence_length: int) -> Tensor:
    """Return windows (N, T+1) int64 of a corpus, its documents separated as in training.

    Raises:
        DataError: its files cannot be read, hold a record that is not text, or less than one window.
    """
    source = SourceConfig(name=corpus.name, files=corpus.files)
    wanted, token_ids = corpus.windows * sequence_length + 1, list[int]()
    for document in read_source(source, source_files(source, "evaluation.corpora")):
        if isinstance(document, Document):
            token_ids.extend(itertools.islice(rule.document(document.text), wanted - len(token_ids)))
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
    return tokens.unfold(0, sequence_length + 1, sequence_length)[:count]  # neighbors share one token


def windows_by_source(corpus: PackedCorpus, sequence_length: int, limit: int) -> dict[str, Tensor]:
    """Return the held-out windows (N, T+1) of each source that fills one, if the corpus has several sources.

    Sources of one name are numbered.
    """
    windows: dict[str, Tensor] = {}
    for source in corpus.sources if len(corpus.sources) > 1 else ():
        if source.tally.validation.tokens > sequence_length:
            name, number = Path(source.label).name, 1
            while (key := name if number == 1 else f"{name}-{number}") in windows:
                number += 1
            windows[key] = held_out_windows(source.tokens("validation"), sequence_length, limit)
    return windows


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Held-out windows and what is needed to score them."""

    windows: Tensor
    """(N, T+1) int64."""
    byte_lengths: Tensor
    """(V,) int64: UTF-8 bytes that each id stands for."""
    rule: TextRule
    """How its text, and every other, is encoded."""
    token_counts: Tensor
    """(V,) int64: how often each id occurs in the training text."""
    by_source: dict[str, Tensor]
    """Windows (N, T+1) of each source, where the corpus has several."""
    corpora: dict[str, Tensor]
    """Windows (N, T+1) of the texts in `evaluation.corpora`."""
    document_separator: int | None
    """The id that ends documents, where the model keeps them apart; None where it sees whole windows."""

    @property
    def tokenizer(self) -> Tokenizer:
        return self.rule.tokenizer

    @property
    def text(self) -> str:
        """The text that the predicted tokens stand for."""
        return "".join(self.rule.plain.decode_batch(self.windows[:, 1:].tolist()))

    def as_trained(self, config: DataConfig) -> "HeldOut":
        """Return the same text for a model of another run, which was trained as `config` says."""
        return replace(self, document_separator=self.rule.separator if config.document_mask else None)

    def mask(self, token_ids: Tensor) -> Tensor | None:
        """Return the attention mask of windows (B, T) that training used with `data.document_mask`; else None."""
        return None if self.document_separator is None else document_mask(token_ids, self.document_separator)

    def score(
        self,
        model: Transformer,
        *,
        batch_size: int = 16,
        share: Share = Share(),  # noqa: B008 - frozen
        progress: Advance = no_advance,
        rows_of: RowsOf | None = None,
    ) -> Score:
        """Score a model on the held-out windows, masked as in training; it mixes `rows_of` the ids if that is given."""
        losses = window_losses(
            model, self.windows, batch_size=batch_size, share=share, progress=progress, mask=self.mask, rows_of=rows_of
        )
        return summarize(losses, self.windows, self.byte_lengths)

    def write(self, run: RunDirectory) -> None:
        """Write everything but the tokenizer into `run`, whole or not at all."""
        tensors = {
            "windows": self.windows.int(),
            "byte_lengths": self.byte_lengths.int(),
            "token_counts": self.token_counts,
            **{f"source/{index}": windows.int() for index, windows in enumerate(self.by_source.values())},
            **{f"corpus/{index}": windows.int() for index, windows in enumerate(self.corpora.values())},
        }
        metadata = {
            "separator": str(self.rule.separator),
            "sources": json.dumps(list(self.by_source)),
            "corpora": json.dumps(list(self.corpora)),
        }
        write_tensors(run.held_out_path, tensors, metadata)


def held_out(
    corpus: PackedCorpus, config: DataConfig, vocab_size: int, corpora: Sequence[EvaluationCorpus] = ()
) -> HeldOut:
    """Cut the held-out windows of a prepared corpus, and of `corpora`, for a model of `vocab_size` ids."""
    rule, sequence_length = corpus.rule, config.sequence_length
    lengths = byte_lengths(rule.tokenizer, vocab_size)
    lengths[list(rule.reserved.values())] = 0
    return HeldOut(
        windows=held_out_windows(corpus.tokens("validation"), sequence_length, config.validation_windows),
        byte_lengths=lengths,
        rule=rule,
        token_counts=corpus.token_counts(vocab_size),
        by_source=windows_by_source(corpus, sequence_length, config.validation_windows),
        corpora={text.name: corpus_windows(text, rule, sequence_length) for text in corpora},
        document_separator=rule.separator if config.document_mask else None,
    )


def held_out_of_run(run: RunDirectory, config: DataConfig) -> tuple[HeldOut, str | None]:
    """Read a run's held-out windows, or cut them again for a run that was made before runs kept them.

    Returns them and, where they were cut again, a sentence that says so and whether the text is another one.

    Raises:
        RunError: `held_out.safetensors` is damaged, or relative paths name other text than the run was trained on.
        DataError: the tokenizer is not the one the run was made with, or the corpus has to be read and cannot be.
    """
    rule = load_run_rule(run.tokenizer_path, run.recorded_tokenizers(), run.text_rule())
    if run.held_out_path.is_file():
        return _read(run, config, rule), None
    with naming("data.cache_dir", Path(config.cache_dir)):
        corpus = prepare_corpus(config, rule)
    found = held_out(corpus, config, run.model_config().vocab_size)
    note = f"{run.held_out_path}: missing, as in runs of version 0.1; the held-out text was read from the corpus"
    recorded = run.recorded_corpus("fingerprint")
    if recorded is None or recorded == corpus.fingerprint:
        return found, note
    if any(not Path(pattern).is_absolute() for source in config.all_sources() for pattern in source.files):
        raise RunError(
            f"{run.config_path}: data.files is relative to the directory that the run was made in, and from here it "
            "names other text; run this verb there"
        )
    return found, (
        f"{note}, which on this machine ({corpus.fingerprint[:12]}) is not the one this run was trained on "
        f"({recorded[:12]}), so scores are over other text"
    )


def recorded_token_counts(run: RunDirectory) -> Tensor | None:
    """Return (V,) int64, how often each id occurs in the run's training text; None where the run does not keep it."""
    return read_tensors(run.held_out_path)["token_counts"] if run.held_out_path.is_file() else None


def _read(run: RunDirectory, config: DataConfig, rule: TextRule) -> HeldOut:
    path = run.held_out_path
    tensors, metadata = read_tensors(path), read_metadata(path)
    try:
        sources, corpora = json.loads(metadata["sources"]), json.loads(metadata["corpora"])
        return HeldOut(
            windows=tensors["windows"].long(),
            byte_lengths=tensors["byte_lengths"].long(),
            rule=rule,
            token_counts=tensors["token_counts"],
            by_source={name: tensors[f"source/{index}"].long() for index, name in enumerate(sources)},
            corpora={name: tensors[f"corpus/{index}"].long() for index, name in enumerate(corpora)},
            document_separator=int(metadata["separator"]) if config.document_mask else None,
        )
    except KeyError as error:
        raise RunError(f"{path}: has no {error}; it was not written here, so copy it from the run again") from error
