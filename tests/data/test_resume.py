"""Interrupted preparation goes on and ends in the same bytes; two processes at once prepare once."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from src.data.config import DataConfig, SourceConfig, TokenizerConfig
from src.data.packed_corpus import PackedCorpus, prepare_corpus
from src.data.text_rule import training_rule
from src.data.tokenizer import load_tokenizer, train_bpe
from src.system.console import Reading
from tests.conftest import CONFIGS
from tests.data.corpora import all_documents, config_for, sentences, write_as

LONG = 25_000  # words of a document: 0.1 MB


class StoppedError(Exception):
    """Stands for whatever ends a process."""


def files_of(corpus: PackedCorpus) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(corpus.sources[0].path.iterdir())}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceConfig:
    """Three shards of 1 MB over three files, with duplicates, in three formats."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = sentences(30, words=LONG)
    texts += texts[3:9]
    write_as("a.jsonl.gz", folder, texts[:10])
    write_as("b.parquet", folder, texts[10:20])
    write_as("c.jsonl.zst", folder, ["", *texts[20:]])
    return SourceConfig(files=[str(folder)])


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe(iter(sentences(200)), 300).save(str(path))
    return path


@pytest.fixture(scope="module")
def config(source: SourceConfig, tokenizer_path: Path) -> DataConfig:
    config = config_for(Path("unused"), source, shard_mb=1, prepare_processes=2)
    return replace(config, tokenizer=TokenizerConfig(path=str(tokenizer_path)))


@pytest.fixture(scope="module")
def whole(config: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> PackedCorpus:
    return prepare_corpus(replace(config, cache_dir=str(tmp_path_factory.mktemp("whole"))))


def test_shards_hold_the_corpus(whole: PackedCorpus) -> None:
    assert len(whole.sources[0].shard_tokens) >= 3
    assert whole.sources[0].tally.duplicates == 6
    assert sorted(all_documents(whole)) == sorted(sentences(30, words=LONG))
    assert {path.suffix for path in whole.sources[0].path.iterdir()} == {".bin", ".json", ".npy"}


@pytest.mark.parametrize("batches", [1, 3])
def test_an_interrupted_preparation_ends_in_the_same_bytes(
    batches: int, config: DataConfig, whole: PackedCorpus, tmp_path: Path
) -> None:
    config = replace(config, cache_dir=str(tmp_path))
    seen: list[Reading] = []

    def stop(reading: Reading) -> None:
        seen.append(reading)
        if len(seen) == batches:
            raise StoppedError

    with pytest.raises(StoppedError):
        prepare_corpus(config, report=stop)
    (building,) = tmp_path.glob("*.building")
    finished = {path: path.stat().st_mtime_ns for path in building.glob("*.json")}
    assert not (building / "index.json").exists()
    resumed = prepare_corpus(replace(config, prepare_processes=1))
    assert files_of(resumed) == files_of(whole)
    for path, stamp in finished.items():  # whole shards were not written again
        assert (resumed.sources[0].path / path.name).stat().st_mtime_ns == stamp
    assert not list(tmp_path.glob("*.building"))


def test_leftovers_of_a_broken_shard_are_overwritten(config: DataConfig, whole: PackedCorpus, tmp_path: Path) -> None:
    building = tmp_path / f"{whole.sources[0].path.name}.building"
    building.mkdir()
    (building / "00000.train.bin").write_bytes(b"half")
    (building / ".00000.json.123.tmp").write_text("{")
    (building / "00001.json").write_text("not reached, for the first shard is missing")
    resumed = prepare_corpus(replace(config, cache_dir=str(tmp_path)))
    assert files_of(resumed) == files_of(whole)


def command(config: DataConfig, cache_dir: Path, source: SourceConfig) -> list[str]:
    overrides = [
        f"data.sources=[{{files: {source.files}}}]",
        f"data.tokenizer.path={config.tokenizer.path}",
        f"data.cache_dir={cache_dir}",
        "data.shard_mb=1",
        "data.prepare_processes=2",
        "data.validation_fraction=0.2",
        "data.sequence_length=16",
    ]
    return [sys.executable, "-m", "src.prepare_data", "--config", str(CONFIGS / "quickstart.yaml"), *overrides]


@pytest.mark.release
@pytest.mark.slow
def test_killed_at_random_moments_it_ends_in_the_same_bytes(
    config: DataConfig, whole: PackedCorpus, source: SourceConfig, tmp_path: Path, attacks: int
) -> None:
    generator, kills = random.Random(0), 0
    (entry,) = [whole.sources[0].path.name]
    while kills < attacks:
        process = subprocess.Popen(command(config, tmp_path, source), start_new_session=True)
        deadline = time.monotonic() + 60
        while not (tmp_path / f"{entry}.building").exists() and time.monotonic() < deadline:
            time.sleep(0.01)  # importing is not what is tested
        time.sleep(generator.uniform(0.05, 0.6))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        if (tmp_path / entry).exists():  # it was faster than the kill: begin anew, the count goes on
            (tmp_path / entry).rename(tmp_path / f"finished-{kills}")
    subprocess.run(command(config, tmp_path, source), check=True)
    assert files_of(prepare_corpus(replace(config, cache_dir=str(tmp_path)))) == files_of(whole)


@pytest.mark.slow
def test_two_processes_at_once_prepare_once(
    config: DataConfig, whole: PackedCorpus, source: SourceConfig, tmp_path: Path
) -> None:
    both = [
        subprocess.Popen(command(config, tmp_path, source), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outputs[0][0] == outputs[1][0]
    assert sum(str(source.files[0]) in stderr for _, stderr in outputs) == 1  # one of them showed progress
    corpus = prepare_corpus(
        replace(config, cache_dir=str(tmp_path)), training_rule(load_tokenizer(Path(str(config.tokenizer.path))), "BPE")
    )
    assert files_of(corpus) == files_of(whole)
