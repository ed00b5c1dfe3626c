"""The held-out text of a run: the same windows for the callback and for every verb."""

import json
from dataclasses import dataclass

from tokenizers import Tokenizer
from torch import Tensor

from src.data.config import DataConfig
from src.data.packed_corpus import PackedCorpus, prepare_corpus
from src.data.tokenizer import byte_lengths, separator_id
from src.data.windows import validation_windows
from src.evaluation.corpora import windows_by_source
from src.evaluation.run_tokenizer import load_run_tokenizer
from src.run_directory import RunDirectory


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
    corpus = prepare_corpus(config, load_run_tokenizer(run))
    found = held_out(corpus, config, run.model_config().vocab_size)
    recorded = _recorded_corpus(run)
    if recorded in (None, corpus.fingerprint):
        return found, None
    return found, (
        f"the corpus on this machine ({corpus.fingerprint[:12]}) is not the one this run was trained on "
        f"({str(recorded)[:12]}), so scores are over other text"
    )


def _recorded_corpus(run: RunDirectory) -> str | None:
    if not run.report_path.is_file():
        return None
    return json.loads(run.report_path.read_text(encoding="utf-8")).get("corpus", {}).get("fingerprint")
