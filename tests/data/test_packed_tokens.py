"""Corpora on disk: split, cache, several sources, tokenizers."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from src.data.config import DataConfig, SourceConfig, TokenizerConfig
from src.data.files import stdlib_files
from src.data.packed_corpus import PackedCorpus, prepare_corpus
from src.data.text_rule import training_rule
from src.data.tokenizer import byte_lengths, fingerprint, load_tokenizer, require_same, train_bpe, vocabulary_size
from src.errors import ConfigError, DataError
from src.system.console import Reading
from tests.conftest import STDLIB
from tests.data.corpora import all_documents, config_for, documents_of, sentences, stdlib_config, write_as


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return stdlib_config(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def corpus(config: DataConfig) -> PackedCorpus:
    return prepare_corpus(config)


def files_of(corpus: PackedCorpus) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(corpus.sources[0].path.iterdir())}


def test_split_is_by_document_and_nothing_is_lost(corpus: PackedCorpus) -> None:
    texts = {path.read_text() for package in ("json", "email") for path in (STDLIB / package).glob("*.py")}
    texts.discard("")
    assert corpus.train.documents + corpus.validation.documents == len(texts)
    assert sorted(all_documents(corpus)) == sorted(texts)


def test_token_counts_and_byte_lengths_add_up(corpus: PackedCorpus) -> None:
    counts = corpus.token_counts(512)
    assert counts.shape == (512,)
    assert int(counts.sum()) == corpus.train.tokens == len(corpus.tokens("train"))
    lengths = byte_lengths(corpus.tokenizer, 512)
    assert int((counts * lengths).sum()) == corpus.train.bytes


@pytest.mark.parametrize(
    ("decoder", "vocabulary"),
    [
        (decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback()]), {"▁日": 4, "<0xE4>": 1, "a": 1}),
        (decoders.WordPiece(), {"##ing": 3, "go": 3}),
        (None, {"é": 2}),
    ],
)
def test_bytes_are_counted_as_the_decoder_writes_them(
    decoder: decoders.Decoder | None, vocabulary: dict[str, int]
) -> None:
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(vocabulary)}, unk_token="a"))
    if decoder is not None:
        tokenizer.decoder = decoder
    assert byte_lengths(tokenizer, len(vocabulary)).tolist() == list(vocabulary.values())


def test_a_document_keeps_its_side_when_the_corpus_grows(config: DataConfig, corpus: PackedCorpus) -> None:
    grown = prepare_corpus(replace(config, files=[*config.files, f"{STDLIB}/http/*.py"]), corpus.rule)
    for split in ("train", "validation"):
        assert set(documents_of(corpus, split)) < set(documents_of(grown, split))


def test_a_second_call_reads_the_cache(config: DataConfig, corpus: PackedCorpus) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in corpus.sources[0].path.iterdir()}
    again = prepare_corpus(replace(config, prepare_processes=7))
    assert {path: path.stat().st_mtime_ns for path in again.sources[0].path.iterdir()} == stamps
    assert fingerprint(again.tokenizer) == fingerprint(corpus.tokenizer)
    assert again.fingerprint == corpus.fingerprint


def test_the_fingerprint_is_of_the_text_and_not_of_where_it_lies(tmp_path: Path) -> None:
    found = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        write_as("t.jsonl", folder, sentences(100))
        found.append(prepare_corpus(config_for(tmp_path / "cache", SourceConfig(files=[str(folder)]))))
    assert found[0].sources[0].path != found[1].sources[0].path
    assert found[0].fingerprint == found[1].fingerprint


def test_changed_inputs_are_noticed(tmp_path: Path) -> None:
    path = write_as("t.jsonl", tmp_path, sentences(100))
    config = config_for(tmp_path / "cache", SourceConfig(files=[str(path)]))
    before = prepare_corpus(config)
    path.write_bytes(path.read_bytes() + json.dumps({"text": "one more"}).encode())
    after = prepare_corpus(config)
    assert "one more" in all_documents(after) and "one more" not in all_documents(before)
    assert after.fingerprint != before.fingerprint


def test_files_that_change_while_they_are_read_are_refused(tmp_path: Path) -> None:
    path = write_as("t.jsonl", tmp_path, sentences(100))
    config = config_for(tmp_path / "cache", SourceConfig(files=[str(path)]))
    tokenizer = train_bpe(iter(sentences(10)), 300)

    def append(reading: Reading) -> None:
        path.write_bytes(path.read_bytes() + b"\n" * (reading.done > 0))

    with pytest.raises(
        DataError, match=r"its files changed while they were read; run again when they no longer change"
    ):
        prepare_corpus(config, training_rule(tokenizer, "BPE"), report=append)


def test_a_damaged_cache_entry_is_refused(tmp_path: Path) -> None:
    path = write_as("t.jsonl", tmp_path, sentences(100))
    config = config_for(tmp_path / "cache", SourceConfig(files=[str(path)]))
    shard = prepare_corpus(config).sources[0].path / "00000.train.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"00000.train.bin: \d+ bytes, but its index says \d+ bytes; remove"):
        prepare_corpus(config)


def test_duplicates_are_dropped_and_counted(tmp_path: Path) -> None:
    texts = sentences(100)
    (tmp_path / ".cache").mkdir()
    write_as("hidden.jsonl", tmp_path / ".cache", sentences(10, seed=2))  # no part of the folder's text
    write_as("a.jsonl", tmp_path, texts)
    write_as("b.jsonl.gz", tmp_path, [*texts[20:50], *sentences(10, seed=1), "twice\n", "twice\n"])
    corpus = prepare_corpus(config_for(tmp_path / ".cache", SourceConfig(files=[str(tmp_path)])))
    assert corpus.sources[0].tally.duplicates == 31
    assert sorted(all_documents(corpus)) == sorted([*texts, *sentences(10, seed=1), "twice\n"])


def test_sources_are_prepared_apart_and_mixed_by_weight(tmp_path: Path) -> None:
    prose = SourceConfig(files=[str(write_as("prose.jsonl", tmp_path, sentences(300)))], weight=3, name="prose")
    code = SourceConfig(files=[f"{STDLIB}/json/*.py"], weight=1)
    corpus = prepare_corpus(config_for(tmp_path / "cache", prose, code, max_empty_fraction=1))
    assert [source.label for source in corpus.sources] == ["prose", f"{STDLIB}/json/*.py"]
    assert [weight for _, weight in corpus.training_streams()] == [3, 1]
    assert len(corpus.tokens("train")) == corpus.train.tokens
    reweighted = prepare_corpus(
        config_for(tmp_path / "cache", replace(prose, weight=1), replace(code, name="code"), max_empty_fraction=1),
        corpus.rule,
    )
    assert [source.path for source in reweighted.sources] == [source.path for source in corpus.sources]
    unweighted = prepare_corpus(
        config_for(tmp_path / "cache", replace(prose, weight=None), replace(code, weight=None)), corpus.rule
    )
    ((tokens, _),) = unweighted.training_streams()
    assert len(tokens) == corpus.train.tokens
    assert unweighted.fingerprint == corpus.fingerprint


def test_stdlib_corpus_has_no_tests_and_no_installed_packages() -> None:
    files = stdlib_files()
    assert len(files) > 300
    parts = {part for path in files for part in path.relative_to(STDLIB).parts}
    assert not parts & {"site-packages", "dist-packages", "idlelib", "test", "tests"}


def test_bad_sources_get_one_clear_line() -> None:
    with pytest.raises(ConfigError, match=r"one of embedded, files and hub, but none of them is set"):
        SourceConfig()
    with pytest.raises(ConfigError, match=r"one of embedded, files and hub, but files and hub is set"):
        SourceConfig(files=["a"], hub="b")
    with pytest.raises(ConfigError, match=r"data.sources: a has weight 0, but it must be above 0"):
        SourceConfig(files=["a"], weight=0)
    with pytest.raises(ConfigError, match=r"a has a weight and b has none; give it to all or none"):
        DataConfig(sources=[SourceConfig(files=["a"], weight=1), SourceConfig(hub="b")])
    with pytest.raises(ConfigError, match=r"data.files and data.sources are both set"):
        DataConfig(files=["a"], sources=[SourceConfig(hub="b")])


def test_bad_tokenizers_get_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no.json: no such tokenizer file"):
        load_tokenizer(tmp_path / "no.json")
    (tmp_path / "junk.json").write_text("{}")
    with pytest.raises(DataError, match=r"junk.json: not a tokenizer.json"):
        load_tokenizer(tmp_path / "junk.json")
    train_bpe(iter(["text"]), 260).save(str(tmp_path / "marked.json"))
    (tmp_path / "marked.json").write_text((tmp_path / "marked.json").read_text(), encoding="utf-8-sig")
    assert vocabulary_size(load_tokenizer(tmp_path / "marked.json")) == 260
    with pytest.raises(ConfigError, match="needs at least 257"):
        TokenizerConfig(vocab_size=100)
    with pytest.raises(ConfigError, match=r"path \('a.json'\) and hub \('b'\) name two tokenizers"):
        TokenizerConfig(path="a.json", hub="b")


def test_a_tokenizer_larger_than_the_model_is_refused_before_any_work(tmp_path: Path) -> None:
    write_as("t.jsonl", tmp_path, sentences(100))
    path = tmp_path / "words.json"
    train_bpe(iter(sentences(50)), 400).save(str(path))
    config = config_for(tmp_path / "cache", SourceConfig(files=[f"{tmp_path}/t.jsonl"]))
    config = replace(config, tokenizer=TokenizerConfig(path=str(path)))
    size = vocabulary_size(load_tokenizer(path))
    message = rf"model.vocab_size: 300, but the tokenizer has {size} ids; set model.vocab_size={size} or more"
    with pytest.raises(DataError, match=message):
        prepare_corpus(config, vocab_size=300)
    assert not (tmp_path / "cache").exists()
    assert prepare_corpus(config, vocab_size=size).train.tokens


def test_a_hub_tokenizer_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_as("t.jsonl", tmp_path, sentences(100))
    config = config_for(tmp_path / "cache", SourceConfig(files=[f"{tmp_path}/t.jsonl"]))
    config = replace(config, tokenizer=TokenizerConfig(hub="owner/name"))
    names: list[str] = []
    tokenizer = train_bpe(iter(sentences(50)), 300)

    class Hub:
        @staticmethod
        def from_pretrained(name: str) -> Tokenizer:
            names.append(name)
            if name == "owner/gone":
                raise Exception("404: not\n  found")  # what the library raises
            return tokenizer

    monkeypatch.setattr("src.data.tokenizer.Tokenizer", Hub)
    assert prepare_corpus(config).train.tokens
    assert names == ["owner/name"]
    with pytest.raises(
        DataError, match=r"could not download owner/gone from the Hugging Face Hub: 404: not found; .+ HF_TOKEN"
    ):
        prepare_corpus(replace(config, tokenizer=TokenizerConfig(hub="owner/gone")))


def test_a_mismatch_of_tokenizers_names_both() -> None:
    require_same("a" * 64, "here", "a" * 64, "there")
    require_same(None, "here", "a" * 64, "there")
    message = r"here: made with tokenizer a{12}, but there has tokenizer b{12}; their ids mean different text"
    with pytest.raises(DataError, match=message):
        require_same("a" * 64, "here", "b" * 64, "there")


def test_data_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    write_as("t.jsonl", tmp_path, sentences(100))
    config = config_for(tmp_path / "cache", SourceConfig(files=[f"{tmp_path}/t.jsonl"]))
    index = prepare_corpus(config).sources[0].path / "index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "tokenizer": "f" * 64}))
    with pytest.raises(DataError, match=r"made with tokenizer f{12}, but data.tokenizer has tokenizer [0-9a-f]{12}"):
        prepare_corpus(config)


def test_vocabulary_size_counts_ids(corpus: PackedCorpus) -> None:
    assert vocabulary_size(corpus.tokenizer) == corpus.tokenizer.get_vocab_size() == 400


def test_ids_beyond_16_bits_take_32(tmp_path: Path) -> None:
    write_as("t.jsonl", tmp_path, sentences(100))
    tokenizer = train_bpe(iter(sentences(50)), 300)
    tokenizer.add_tokens([f"<{number}>" for number in range(2**16)])
    tokenizer.add_tokens(["document"])
    config = config_for(tmp_path / "cache", SourceConfig(files=[f"{tmp_path}/t.jsonl"]))
    corpus = prepare_corpus(config, training_rule(tokenizer, "BPE"))
    assert corpus.tokens("train").dtype == "<u4"
    assert int(np.max(corpus.tokens("train").read(0, 100))) > 2**16
    assert sorted(all_documents(corpus)) == sorted(sentences(100))
