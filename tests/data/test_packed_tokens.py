"""Corpora on disk: split, cache, and windows as a pure function of (seed, step)."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from src.data.config import DataConfig, TokenizerConfig
from src.data.corpus import read_documents, stdlib_files
from src.data.datamodule import StepSampler, StepWindows
from src.data.packed_tokens import PackedCorpus, permute, prepare_corpus, training_windows, validation_windows
from src.data.tokenizer import byte_lengths, fingerprint, load_tokenizer, vocabulary_size
from src.errors import ConfigError, DataError
from tests.conftest import STDLIB


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return DataConfig(
        files=[f"{STDLIB}/json/*.py", f"{STDLIB}/email/*.py"],
        tokenizer=TokenizerConfig(vocab_size=400),
        sequence_length=32,
        global_batch_size=8,
        micro_batch_size=2,
        validation_fraction=0.2,
        cache_dir=str(tmp_path_factory.mktemp("cache")),
    )


@pytest.fixture(scope="module")
def corpus(config: DataConfig) -> PackedCorpus:
    return prepare_corpus(config)


def documents_of(corpus: PackedCorpus, split: str) -> list[str]:
    tokens = corpus.tokens(split)
    ends = np.flatnonzero(tokens == corpus.tokenizer.token_to_id("<|endoftext|>")) + 1
    return [corpus.tokenizer.decode(piece.tolist()) for piece in np.split(tokens, ends) if len(piece)]


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**32), epoch=st.integers(0, 5))
def test_permute_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    mapped = permute(np.arange(size, dtype=np.int64), size, key=(seed, epoch))
    assert np.array_equal(np.sort(mapped), np.arange(size))


def test_permutations_of_epochs_and_seeds_differ() -> None:
    index = np.arange(1000, dtype=np.int64)
    orders = [permute(index, 1000, key=key) for key in ((0, 0), (0, 1), (1, 0))]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (orders[first] == orders[second]).mean() < 0.02
    assert abs(np.corrcoef(index, orders[0])[0, 1]) < 0.1


def test_an_epoch_holds_every_window_once_and_windows_overlap_by_one_token(corpus: PackedCorpus) -> None:
    tokens = corpus.tokens("train")
    num_windows = (len(tokens) - 1) // 32
    windows = training_windows(tokens, 32, np.arange(num_windows, dtype=np.int64), seed=0)
    expected = {tuple(tokens[start * 32 : start * 32 + 33].tolist()) for start in range(num_windows)}
    assert {tuple(window) for window in windows.tolist()} == expected


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_each_step_without_overlap(corpus: PackedCorpus, config: DataConfig, world_size: int) -> None:
    alone = StepWindows(corpus, config, rank=0, world_size=1)
    ranks = [StepWindows(corpus, config, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in (0, 7, 1000):
        shares = torch.stack([rank[step] for rank in ranks], dim=1)  # (A, world, B, T+1)
        assert torch.equal(shares.flatten(0, 1), alone[step])


def test_a_position_is_one_integer(corpus: PackedCorpus, config: DataConfig) -> None:
    dataset = StepWindows(corpus, config, rank=0, world_size=1)
    resumed = iter(StepSampler(5))
    assert torch.equal(dataset[next(resumed)], dataset[5])
    assert not torch.equal(dataset[5], StepWindows(corpus, replace(config, seed=1), 0, 1)[5])


def test_split_is_by_document_and_nothing_is_lost(corpus: PackedCorpus, config: DataConfig) -> None:
    documents = list(read_documents(config.files))
    assert corpus.train.documents + corpus.validation.documents == len(documents)
    texts = [*documents_of(corpus, "train"), *documents_of(corpus, "validation")]
    assert sorted(texts) == sorted(document.text for document in documents)


def test_token_counts_and_byte_lengths_add_up(corpus: PackedCorpus) -> None:
    counts = corpus.token_counts(512)
    assert counts.shape == (512,)
    assert int(counts.sum()) == corpus.train.tokens
    lengths = byte_lengths(corpus.tokenizer, 512)
    assert int((counts * lengths).sum()) == corpus.train.bytes


def test_a_document_keeps_its_side_when_the_corpus_grows(config: DataConfig, corpus: PackedCorpus) -> None:
    grown = prepare_corpus(replace(config, files=[*config.files, f"{STDLIB}/http/*.py"]), corpus.tokenizer)
    for split in ("train", "validation"):
        assert set(documents_of(corpus, split)) < set(documents_of(grown, split))


def test_a_second_call_reads_the_cache(config: DataConfig, corpus: PackedCorpus) -> None:
    stamp = (corpus.path / "train.bin").stat().st_mtime_ns
    again = prepare_corpus(config)
    assert again.path == corpus.path
    assert (again.path / "train.bin").stat().st_mtime_ns == stamp
    assert fingerprint(again.tokenizer) == fingerprint(corpus.tokenizer)


def test_an_interrupted_preparation_is_done_again(config: DataConfig, corpus: PackedCorpus, tmp_path: Path) -> None:
    other = replace(config, cache_dir=str(tmp_path))
    half_done = tmp_path / f"{corpus.path.name}.building"
    half_done.mkdir()
    (half_done / "train.bin").write_bytes(b"half")
    assert (prepare_corpus(other).path / "train.bin").read_bytes() == (corpus.path / "train.bin").read_bytes()


def test_validation_windows_are_spread_and_fixed(corpus: PackedCorpus) -> None:
    tokens = corpus.tokens("validation")
    few, many = validation_windows(tokens, 32, 4), validation_windows(tokens, 32, 10**6)
    assert len(few) == 4
    assert len(many) == (len(tokens) - 1) // 32
    assert torch.equal(few[0], many[0])
    assert torch.equal(few[2], many[len(many) // 2])


def test_stdlib_corpus_has_no_tests_and_no_installed_packages() -> None:
    files = stdlib_files()
    assert len(files) > 300
    parts = {part for path in files for part in path.relative_to(STDLIB).parts}
    assert not parts & {"site-packages", "dist-packages", "idlelib", "test", "tests"}


def test_bad_corpora_get_one_clear_line(tmp_path: Path, config: DataConfig) -> None:
    with pytest.raises(DataError, match=r"data.files: '.*nothing\*' matches no file"):
        prepare_corpus(replace(config, files=[f"{tmp_path}/nothing*"]))
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"the training split has no document with text"):
        prepare_corpus(replace(config, files=[f"{tmp_path}/empty.txt"]))
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.txt: not UTF-8 at byte 3"):
        prepare_corpus(replace(config, files=[f"{tmp_path}/latin.txt"]))
    for index in range(40):
        (tmp_path / f"short{index}.txt").write_text(f"only {index}")
    with pytest.raises(DataError, match=r"less than one window of data.sequence_length"):
        prepare_corpus(replace(config, files=[f"{tmp_path}/short*.txt"], sequence_length=4096))


def test_bad_tokenizers_get_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no.json: no such tokenizer file"):
        load_tokenizer(tmp_path / "no.json")
    (tmp_path / "junk.json").write_text("{}")
    with pytest.raises(DataError, match=r"junk.json: not a tokenizer.json"):
        load_tokenizer(tmp_path / "junk.json")
    with pytest.raises(ConfigError, match="needs at least 257"):
        TokenizerConfig(vocab_size=100)


def test_vocabulary_size_counts_ids(corpus: PackedCorpus) -> None:
    assert vocabulary_size(corpus.tokenizer) == corpus.tokenizer.get_vocab_size() == 400
