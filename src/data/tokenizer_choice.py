"""The tokenizer of a config: loaded, fetched, or trained on the corpus once and kept beside it."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from src.data.cache import entry_key, exclusive
from src.data.config import DataConfig, SourceConfig
from src.data.corpus import Document, is_held_out, read_source
from src.data.files import source_files
from src.data.progress import Reading, Report
from src.data.tokenizer import load_hub_tokenizer, load_tokenizer, train_bpe
from src.files import write_text

_SMALL = 4
"""A file may expand so far; a source below its budget divided by this is read whole."""


def choose_tokenizer(config: DataConfig, report: Report) -> Tokenizer:
    """Return the tokenizer that `config.tokenizer` names, trained if it names none.

    Raises:
        DataError: it cannot be had, or has no document separator.
    """
    if config.tokenizer.path is not None:
        return load_tokenizer(Path(config.tokenizer.path))
    if config.tokenizer.hub is not None:
        return load_hub_tokenizer(config.tokenizer.hub)
    sources = config.all_sources()
    files = [source_files(source) for source in sources]
    path = Path(config.cache_dir) / f"tokenizer-{_key(config, sources, files)}.json"
    if not path.is_file():
        with exclusive(path.with_suffix(".lock")):
            if not path.is_file():
                report(Reading("training a tokenizer", 0, 1, "steps"))
                texts = _training_texts(config, sources, files)
                write_text(path, train_bpe(texts, config.tokenizer.vocab_size).to_str(pretty=True))
                report(Reading("training a tokenizer", 1, 1, "steps"))
    return load_tokenizer(path)


def _key(config: DataConfig, sources: Sequence[SourceConfig], files: Sequence[list[Path]]) -> str:
    recipe = f"bpe {config.tokenizer.vocab_size} {config.tokenizer.training_mb}"
    keys = [entry_key(source, paths, config, recipe) for source, paths in zip(sources, files, strict=True)]
    return keys[0] if len(keys) == 1 else entry_key(sources[0], [], config, json.dumps(keys))


def _training_texts(config: DataConfig, sources: Sequence[SourceConfig], files: Sequence[list[Path]]) -> Iterator[str]:
    """Yield training documents, at most `training_mb` of text, in equal parts from sources and from their files."""
    budget = config.tokenizer.training_mb * 10**6 // len(sources)
    for source, paths in zip(sources, files, strict=True):
        stored = sum(path.stat().st_size for path in paths)
        share = budget if source.hub is not None or stored * _SMALL <= budget else budget // len(paths)
        left = budget
        for part in [paths] if source.hub is not None else [[path] for path in paths]:
            taken = 0
            for text in _training_documents(source, part, config):
                taken += len(text)
                yield text
                if taken >= min(share, left):
                    break
            left -= taken
            if left <= 0:
                break


def _training_documents(source: SourceConfig, files: list[Path], config: DataConfig) -> Iterator[str]:
    for item in read_source(source, files):
        if isinstance(item, Document) and not is_held_out(item.content_hash, config.validation_fraction, config.seed):
            yield item.text
