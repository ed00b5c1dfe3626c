"""One tokenizer for data, model and table: another one is refused, with both names."""

import shutil
from pathlib import Path

import pytest

from src import generate
from src.config import load_run_config
from src.data.tokenizer import fingerprint, load_tokenizer, train_bpe
from src.errors import DataError
from src.evaluation.held_out import held_out_of_run
from src.run_directory import RunDirectory
from src.train import RunResult
from tests.data.corpora import sentences


def test_a_run_with_another_tokenizer_is_refused(trained: RunResult, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(trained.run_dir, run.path, ignore=shutil.ignore_patterns("checkpoints"))
    expected = fingerprint(load_tokenizer(run.tokenizer_path))[:12]
    train_bpe(iter(sentences(100)), 300).save(str(run.tokenizer_path))
    found = fingerprint(load_tokenizer(run.tokenizer_path))[:12]
    model = rf"{run.path} \(as its report.json says\): made with tokenizer {expected}"
    with pytest.raises(DataError, match=rf"{model}, but {run.tokenizer_path} has tokenizer {found}; their ids mean"):
        held_out_of_run(run, load_run_config(run).data)
    run.report_path.unlink()
    with pytest.raises(
        DataError, match=rf"{run.path}/lut: made with tokenizer {expected}, but .+ has tokenizer {found}"
    ):
        generate.main(["--run", str(run.path), "--prompt", "x"])
