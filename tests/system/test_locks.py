"""File systems without file locks: one process works there after one note, ranks that nothing orders get one line."""

import errno
import fcntl
import os
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

from src.data.config import DataConfig, SourceConfig
from src.data.packed_corpus import prepare_corpus
from src.errors import DataError
from src.lut.verification import verify_table
from src.system.locks import lock, note_missing_locks
from src.train import train
from src.training.lightning_module import LanguageModel
from tests.conftest import small_config
from tests.data.corpora import config_for, sentences, write_as
from tests.lut.builds import FixedRows, build_on_ranks, random_rows
from tests.training.test_lightning_module import ONLY_TRAIN

NOTE = "has no file locks (flock)"


def corpus_config(folder: Path) -> DataConfig:
    text = write_as("text.jsonl", folder, sentences(40))
    return config_for(folder / "cache", SourceConfig(files=[str(text)]))


@pytest.fixture(params=[errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def without_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    def refused(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    note_missing_locks.cache_clear()
    monkeypatch.setattr(fcntl, "flock", refused)
    yield
    note_missing_locks.cache_clear()


@pytest.mark.usefixtures("without_locks")
def test_a_corpus_is_prepared_and_tables_are_built_after_one_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = prepare_corpus(corpus_config(tmp_path))
    assert corpus.train.documents + corpus.validation.documents == 40
    for world_size in (1, 2):
        lut_dir = tmp_path / f"lut-{world_size}"
        build_on_ranks(FixedRows(random_rows()), lut_dir, world_size, dtype="float32")
        assert verify_table(lut_dir) == []
    assert capsys.readouterr().err.count(NOTE) == 1


@pytest.mark.usefixtures("without_locks")
@pytest.mark.parametrize("launcher", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_ranks_that_start_together_prepare_nothing(
    launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = corpus_config(tmp_path)
    monkeypatch.setenv(launcher, "2")
    with pytest.raises(DataError, match=r"^data\.cache_dir: .* without file locks .*prepare_data"):
        prepare_corpus(config)
    monkeypatch.setenv(launcher, "1")
    prepared = prepare_corpus(config)
    monkeypatch.setenv(launcher, "2")
    assert prepare_corpus(config).fingerprint == prepared.fingerprint


@pytest.mark.usefixtures("without_locks")
@pytest.mark.parametrize("without_locks", [errno.ENOLCK], indirect=True)
def test_training_says_so_before_its_first_step(
    tmp_path: Path,
    small_overrides: Sequence[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = small_config(small_overrides, tmp_path, *ONLY_TRAIN, "lut.at_fit_end=true", "trainer.max_steps=1")
    told: list[str] = []
    step = LanguageModel.training_step

    def noting(*arguments: Any) -> Any:
        told.append(capsys.readouterr().err)
        return step(*arguments)

    monkeypatch.setattr(LanguageModel, "training_step", noting)
    assert (train(config).run_dir / "lut" / "manifest.json").is_file()
    assert [text.count(NOTE) for text in told] == [1]
    assert NOTE not in capsys.readouterr().err


def test_other_failures_of_locks_are_not_hidden(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as handle:
        descriptor = handle.fileno()
    with pytest.raises(OSError, match="Bad file descriptor"):
        lock(descriptor)
