"""Where documents are too few to hold out whole ones, the end of each is held out."""

from dataclasses import replace
from pathlib import Path

import pytest

from src.data.config import DataConfig, SourceConfig, TokenizerConfig
from src.data.packed_corpus import PackedCorpus, prepare_corpus
from src.data.tokenizer import train_bpe
from src.errors import DataError
from tests.data.corpora import config_for, documents_of, sentences, write_as


def held_out_share(corpus: PackedCorpus) -> float:
    return corpus.validation.bytes / (corpus.train.bytes + corpus.validation.bytes)


def one_source(folder: Path, name: str, num_documents: int, seed: int = 0) -> SourceConfig:
    texts = ["".join(sentences(200, seed=seed * 100 + number)) for number in range(num_documents)]
    if name.endswith(".txt"):
        for number, text in enumerate(texts):
            (folder / f"{seed}-{number}-{name}").write_text(text)
        return SourceConfig(files=[f"{folder}/{seed}-*-{name}"])
    return SourceConfig(files=[str(write_as(f"{seed}.{name}", folder, texts))])


@pytest.mark.parametrize("name", ["t.txt", "t.jsonl", "t.parquet"])
@pytest.mark.parametrize("num_documents", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_one_or_two_documents_are_enough(
    num_documents: int, name: str, seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(tmp_path / "cache", one_source(tmp_path, name, num_documents), seed=seed)
    config = replace(config, validation_fraction=0.05)
    corpus = prepare_corpus(config)
    train, held_out = documents_of(corpus, "train"), documents_of(corpus, "validation")
    texts = ["".join(sentences(200, seed=number)) for number in range(num_documents)]
    strip = "<|endoftext|>"
    assert [a.removesuffix(strip) + b.removesuffix(strip) for a, b in zip(train, held_out, strict=True)] == texts
    assert all(text.removesuffix(strip).endswith("\n") for text in train)
    assert 0.04 < held_out_share(corpus) < 0.08
    assert "so the last 5.0% of each document is held out" in capsys.readouterr().err
    assert corpus.facts()["sources"][0]["held_out_part"] == 0.05  # pyright: ignore[reportIndexIssue]
    assert prepare_corpus(config, corpus.rule).fingerprint == corpus.fingerprint  # as a run opens it again
    assert prepare_corpus(config).fingerprint == corpus.fingerprint


def test_a_short_document_holds_out_a_window(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("".join(sentences(4)))
    config = config_for(tmp_path / "cache", SourceConfig(files=[f"{tmp_path}/t.txt"]), validation_fraction=0.01)
    corpus = prepare_corpus(config)
    assert corpus.validation.tokens > config.sequence_length
    assert held_out_share(corpus) > 0.1


def test_the_tokenizer_is_trained_on_the_training_part(tmp_path: Path) -> None:
    words = "".join(sentences(200))
    (tmp_path / "t.txt").write_text(words + "zyzzyva " * 150)
    config = config_for(tmp_path / "cache", SourceConfig(files=[f"{tmp_path}/t.txt"]), validation_fraction=0.05)
    expected = train_bpe(iter([documents_of(prepare_corpus(config), "train")[0].removesuffix("<|endoftext|>")]), 300)
    assert prepare_corpus(config).tokenizer.get_vocab() == expected.get_vocab()


def test_a_weighted_source_of_one_document_takes_part_in_training(tmp_path: Path) -> None:
    many, one = one_source(tmp_path, "t.jsonl", 40), one_source(tmp_path, "t.txt", 1, seed=1)
    sources = [replace(many, weight=1.0), replace(one, weight=1.0)]
    parts: set[float] = set()
    for seed in range(12):  # in some of them the document would be held out
        corpus = prepare_corpus(config_for(tmp_path / "cache", *sources, seed=seed))
        assert corpus.sources[0].held_out_part == 0
        assert corpus.sources[1].tally.train.documents == 1
        parts.add(corpus.sources[1].held_out_part)
    assert parts == {0, 0.2}


def test_a_split_by_documents_that_succeeds_stays(tmp_path: Path) -> None:
    config = config_for(tmp_path / "cache", one_source(tmp_path, "t.jsonl", 40))
    corpus = prepare_corpus(config)
    assert corpus.sources[0].held_out_part == 0
    assert "held_out_part" not in str(corpus.facts())
    assert corpus.validation.documents + corpus.train.documents == 40


@pytest.mark.parametrize("text", ["x", "word " * 3])
def test_too_little_text_for_any_window_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(text)
    config = DataConfig(
        files=[f"{tmp_path}/t.txt"], tokenizer=TokenizerConfig(vocab_size=300), cache_dir=str(tmp_path / "cache")
    )
    with pytest.raises(DataError, match=r"the train split of the corpus has \d+ tokens, less than one window of data"):
        prepare_corpus(config)
