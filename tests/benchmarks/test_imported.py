"""The comparison with transformers measures what it says, on a model that takes seconds."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from src import convert
from src.benchmarks import imported
from src.errors import UserError
from src.interop.llama import LLAMA
from tests.conftest import STDLIB
from tests.interop.checkpoints import write_block_folder
from tests.model.models import DENSE


def test_it_prints_and_writes_every_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    folder, run, output = tmp_path / "folder", tmp_path / "run", tmp_path / "imported.json"
    write_block_folder(
        folder, replace(DENSE, vocab_size=2048, activation="swiglu", max_sequence_length=1024), LLAMA, torch.bfloat16
    )
    convert.main(["--from", "hf", "--input", str(folder), "--output", str(run)])
    which = ["--folder", str(folder), "--run", str(run), "--corpus", f"{STDLIB}/json/*.py"]
    imported.main([*which, "--batches", "1", "2", "--rounds", "3", "--output", str(output)])
    written = json.loads(output.read_text())
    assert written["dtype"] == "bfloat16"
    assert {title: {name: len(taken) for name, taken in by.items()} for title, by in written["seconds"].items()} == {
        f"batch {batch}": {imported.HERE: 3, imported.THERE: 3} for batch in (1, 2)
    }
    assert "batch 2: this project over transformers" in capsys.readouterr().out


def test_a_folder_that_transformers_does_not_open_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing/tokenizer\.json is missing"):
        imported.find_tokenizer(tmp_path / "nothing")
