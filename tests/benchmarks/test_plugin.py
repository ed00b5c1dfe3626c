"""The benchmark of plug-ins measures what it says, on a model that takes seconds."""

import json
from pathlib import Path

import pytest

from src.benchmarks import plugin
from src.errors import RunError
from src.run_directory import RunDirectory
from src.train import RunResult
from tests.conftest import STDLIB


def test_it_measures_training_memory_and_decoding(
    dense_run: RunDirectory,
    plug_in_run: RunResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(plugin, "PROMPT_TOKENS", 16)
    output = tmp_path / "plugin.json"
    smaller = ["data.sequence_length=32", "data.global_batch_size=4", "data.micro_batch_size=2"]
    which = ["--base", str(dense_run.path), "--attach", str(plug_in_run.run_dir), "--corpus", f"{STDLIB}/json/*.py"]
    plugin.main([*which, "--batches", "2", "--rounds", "2", "--decode-rounds", "3", "--output", str(output), *smaller])
    written, printed = json.loads(output.read_text()), capsys.readouterr().out
    taken = {title: {name: len(times) for name, times in by.items()} for title, by in written["seconds"].items()}
    assert taken == {
        "training": {plugin.PLUG_IN: 2, plugin.FULL: 2},
        "decode, batch 2": {plugin.BASE: 3, plugin.COLD: 3, plugin.WARM: 3},
    }
    assert min(written["peak_bytes"].values()) > 100 * 2**20, "a process with torch in it"
    assert "peak resident memory: plug-in over full" in printed
    assert "decode step, batch 2: plug-in, cold disk over base alone" in printed


def test_both_trainings_differ_in_what_is_trained_alone(dense_run: RunDirectory) -> None:
    configs = plugin.training_configs(dense_run.path, ["data.sequence_length=32"])
    (frozen, full) = configs[plugin.PLUG_IN], configs[plugin.FULL]
    assert (frozen.data, frozen.trainer) == (full.data, full.trainer)
    assert (frozen.optimizer.trains_backbone, full.optimizer.trains_backbone) == (False, True)
    assert (frozen.model.num_experts, full.model.num_experts) == (2, 0)


def test_a_base_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="--base"):
        plugin.main(["--base", str(tmp_path / "nothing")])
