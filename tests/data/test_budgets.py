"""What gives no document is counted and skipped within a budget; above it, one clear error names file and line."""

import json
from pathlib import Path

import pytest

from src.config import load_config
from src.data.config import DataConfig, SourceConfig
from src.data.packed_corpus import prepare_corpus
from src.data.shards import Tally
from src.data.text_rule import training_rule
from src.data.tokenizer import train_bpe
from src.errors import ConfigError, DataError
from tests.conftest import CONFIGS
from tests.data.corpora import config_for, json_lines, sentences

RULE = training_rule(train_bpe(iter(sentences(50)), 300), "BPE")


def lines_with_broken_ones(count: int, broken: list[int]) -> bytes:
    lines = [b'{"text": "the text of document %d"}' % number for number in range(count)]
    for number in broken:
        lines[number] = lines[number][:-3]
    return b"\n".join(lines)


def prepare(config: DataConfig) -> Tally:
    return prepare_corpus(config, RULE).sources[0].tally


def test_broken_lines_within_the_budget_are_counted(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(lines_with_broken_ones(3000, [5, 77, 2999]))
    tally = prepare(config_for(tmp_path / "cache", SourceConfig(files=[f"{tmp_path}/t.jsonl"])))
    assert (tally.records, tally.skipped) == (3000, {"broken JSON": 3})
    assert tally.examples["broken JSON"].startswith(f"{tmp_path}/t.jsonl:6: not JSON: ")
    assert tally.train.documents + tally.validation.documents == 2997


def test_above_the_budget_the_first_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(lines_with_broken_ones(3000, [5, 77, 80, 2999]))
    config = config_for(tmp_path / "cache", SourceConfig(files=[f"{tmp_path}/t.jsonl"]))
    with pytest.raises(DataError) as error:
        prepare(config)
    assert str(error.value).startswith(f"{tmp_path}/t.jsonl:6: not JSON: ")
    assert str(error.value).endswith(
        f"; 4 of 3,000 records of {tmp_path}/t.jsonl are broken JSON, more than data.max_malformed_fraction (0.001) "
        "allows; correct the text, leave it out, or raise that share"
    )
    with pytest.raises(DataError, match=r"t.jsonl:6: not JSON"):
        prepare(config)  # finished shards change nothing


def test_far_above_the_budget_the_rest_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(lines_with_broken_ones(50_000, list(range(5, 50_000, 50))))
    config = config_for(tmp_path / "cache", SourceConfig(files=[f"{tmp_path}/t.jsonl"]))
    with pytest.raises(DataError, match=r"t.jsonl:6: not JSON: .+; 201 of 10,006 records"):
        prepare(config)


def test_a_budget_can_be_raised_without_tokenizing_again(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(lines_with_broken_ones(300, [5, 6, 7]))
    source = SourceConfig(files=[f"{tmp_path}/t.jsonl"])
    with pytest.raises(DataError, match=r"3 of 300 records"):
        prepare(config_for(tmp_path / "cache", source))
    (building,) = (tmp_path / "cache").glob("*.building")
    stamp = (building / "00000.train.bin").stat().st_mtime_ns
    config = config_for(tmp_path / "cache", source, max_malformed_fraction=0.01)
    assert prepare(config).skipped == {"broken JSON": 3}
    assert (building.with_suffix("") / "00000.train.bin").stat().st_mtime_ns == stamp


def test_one_file_in_the_wrong_encoding_is_over_the_budget_of_a_small_corpus(tmp_path: Path) -> None:
    for number, text in enumerate(sentences(20)):
        (tmp_path / f"{number}.txt").write_text(text)
    (tmp_path / "latin.txt").write_bytes("one\nthe café".encode("latin-1"))
    config = config_for(tmp_path / "cache", SourceConfig(files=[f"{tmp_path}/*.txt"]))
    with pytest.raises(DataError, match=r"latin.txt:2: not UTF-8 at byte 7 of the line; 1 of 21 records of .+ UTF-8"):
        prepare(config)


def test_empty_records_have_a_budget_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(json_lines([*sentences(60), *([""] * 59)]))
    source = SourceConfig(files=[f"{tmp_path}/t.jsonl"])
    assert prepare(config_for(tmp_path / "cache", source)).skipped == {"empty": 59}
    message = (
        r"t.jsonl:61: no text; 59 of 119 records of .+ are empty, more than data.max_empty_fraction \(0.1\) allows"
    )
    with pytest.raises(DataError, match=message):
        prepare(config_for(tmp_path / "other", source, max_empty_fraction=0.1))


def test_a_corpus_without_text_gets_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    config = config_for(tmp_path / "cache", SourceConfig(files=[f"{tmp_path}/empty.txt"]))
    with pytest.raises(DataError, match=r"empty.txt:1: no text; 1 of 1 records of .+ are empty, more than"):
        prepare_corpus(config)
    (tmp_path / "none.json").write_text("[]")
    config = config_for(tmp_path / "cache", SourceConfig(files=[f"{tmp_path}/none.json"]))
    with pytest.raises(
        DataError, match=r"the train split of the corpus has no document with text in it; add documents"
    ):
        prepare_corpus(config)
    (tmp_path / "short.jsonl").write_bytes(json_lines(sentences(40, words=1)))
    source = SourceConfig(files=[f"{tmp_path}/short.jsonl"])
    with pytest.raises(DataError, match=r"less than one window of data.sequence_length 4096 \+ 1; add text or shorten"):
        prepare_corpus(config_for(tmp_path / "cache", source, sequence_length=4096))


def test_mistakes_in_sources_get_one_clear_line() -> None:
    quickstart = CONFIGS / "quickstart.yaml"
    config = load_config(quickstart, ["data.sources=[{files: [a], weight: 2}, {hub: b, weight: 1}]"])
    assert [(source.label, source.weight) for source in config.data.all_sources()] == [("a", 2), ("b", 1)]
    for override, message in (
        (
            "data.sources=[{file: [a]}]",
            r"unknown key 'data.sources\[0\].file'; did you mean 'data.sources\[0\].files'",
        ),
        ("data.sources=[{files: [a], weight: much}]", r"weight: 'much', but it must be a number, or null"),
        ("data.sources=[{files: [a], weight: -1}]", r"data.sources: a has weight -1.0, but it must be above 0"),
        ("data.sources=[{name: x}]", r"must name one of embedded, files and hub, but none of them is set"),
        ("data.shard_mb=0", r"data.shard_mb: 0, but it must be at least 1"),
        ("data.max_empty_fraction=2", r"data.max_empty_fraction: 2.0, but it must be at least 0 and at most 1"),
        ("data.tokenizer.training_mb=0", r"data.tokenizer.training_mb: 0, but it must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(quickstart, [override])


@pytest.mark.release
@pytest.mark.slow
def test_ten_broken_lines_of_a_million_are_reported_exactly(tmp_path: Path) -> None:
    broken = [0, 7, 99_999, 100_000, 123_456, 500_000, 500_001, 777_777, 900_000, 999_999]
    (tmp_path / "t.jsonl").write_bytes(lines_with_broken_ones(1_000_000, broken))
    config = config_for(tmp_path / "cache", SourceConfig(files=[f"{tmp_path}/t.jsonl"]), prepare_processes=2)
    tally = prepare(config)
    assert (tally.records, tally.skipped) == (1_000_000, {"broken JSON": 10})
    assert tally.train.documents + tally.validation.documents == 999_990
    assert json.dumps(tally.examples).count("t.jsonl:1: not JSON") == 1
