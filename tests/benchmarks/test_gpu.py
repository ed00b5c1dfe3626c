"""The GPU benchmark, on the CPU in a size that takes seconds: every figure is there, and minutes bound it."""

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from torch import nn

from src.benchmarks import common, gpu, train
from src.benchmarks.common import count_waits
from src.model import ModelConfig
from tests.conftest import CONFIGS, STDLIB

TINY = ModelConfig(vocab_size=300, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64)
FORMS = ["dense", "disk, cold", "disk, warm", "table in RAM", "table on the device"]


def test_it_prints_and_writes_every_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    for module in (common, gpu, train):
        monkeypatch.setattr(module, "dense_config", {"small": TINY}.__getitem__)
    monkeypatch.setattr(gpu, "LEAST_ROUNDS", 2)
    monkeypatch.setattr(gpu, "MOST_ROUNDS", 2)
    corpus = [str(path) for path in sorted((STDLIB / "email").glob("*.py"))]
    sizes = ["--shape", "small", "--experts", "2", "--windows", "2", "--sequence-length", "16", "--batches", "1", "3"]
    written = tmp_path / "gpu.json"
    gpu.main(["--device", "cpu", *sizes, "--directory", str(tmp_path), "--output", str(written), "--corpus", *corpus])
    record, printed = json.loads(written.read_text()), capsys.readouterr().out
    names = [f"{name}, {how}" for how in ("eager", "compiled") for name in ("Dense", "MoE-6E", "MoLE-2E")]
    assert [step["name"] for step in record["training"]] == names
    assert all(step["tokens_per_second"] > 0 and step["peak_bytes"] is not None for step in record["training"])
    assert {step["waits"] for step in record["training"]} == {None}  # which are CUDA's
    assert list(record["decoding"]) == ["1", "3"]
    for figures in record["decoding"].values():
        assert set(figures["seconds"]) == {*FORMS, "plain matmuls alone"}
        assert list(figures["waits"]) == FORMS
    assert record["left_out"] == {}
    assert {"processor", "torch"} <= set(record["machine"])
    assert all(name in printed for name in (*names, "table in RAM", str(record["machine"]["processor"])))
    assert not list(tmp_path.glob("benchmark-*"))


def cell_of(clock: list[float], start: float, each: float) -> Callable[[], Callable[[int], int]]:
    """Return a cell that takes seconds of a clock to begin, and for each round."""

    def begin() -> Callable[[int], int]:
        def measure(rounds: int) -> int:
            clock[0] += each * rounds
            return rounds

        clock[0] += start
        return measure

    return begin


def test_few_minutes_are_fewer_rounds_then_fewer_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    budget = gpu.Budget(minutes=1, cells=5)
    assert budget.cell("cheap", cell_of(clock, 0, 0.01)) == gpu.MOST_ROUNDS
    assert gpu.LEAST_ROUNDS <= (budget.cell("dear", cell_of(clock, 2, 1)) or 0) < gpu.MOST_ROUNDS
    assert budget.cell("slow to begin", cell_of(clock, 20, 6)) == gpu.LEAST_ROUNDS
    assert budget.cell("late", cell_of(clock, 1, 1)) is None

    def too_large() -> Callable[[int], int]:
        raise torch.OutOfMemoryError

    clock[0] = 0
    assert budget.cell("large", too_large) is None
    assert budget.left_out == {"late": "no time was left", "large": "the GPU's memory was too small"}


def test_waits_of_a_gpu_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def work() -> None:
        for message in ("called a synchronizing CUDA operation", "something else") * 2:
            warnings.warn(message, stacklevel=1)

    assert count_waits(work, torch.device("cuda")) == 2
    assert modes == ["warn", "default"]


@pytest.mark.parametrize("failing", ["", "pytest", "src.benchmarks.gpu"])
def test_one_script_runs_tests_and_benchmark_with_carried_wheels(failing: str, tmp_path: Path) -> None:
    (python := tmp_path / "python").write_text(
        f'#!/bin/sh\necho "$PYTHONPATH $@" >> {tmp_path}/calls\n[ "$2" != "{failing}" ]\n'
    )
    python.chmod(0o755)
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "omegaconf-2.4-py3-none-any.whl").touch()
    command = ["bash", "src/benchmarks/gpu_acceptance.sh", str(tmp_path / "results"), str(tmp_path / "wheels")]
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(python)}
    assert subprocess.run(command, cwd=CONFIGS.parent, env=environment, check=False).returncode == bool(failing)
    install, tests, benchmark = (tmp_path / "calls").read_text().splitlines()
    packages = re.search(r"--target (\S+) .*/wheels/omegaconf-2.4-py3-none-any.whl$", install)
    assert packages is not None
    assert tests.split()[:3] == [packages[1], "-m", "pytest"] and tests.endswith("tests/gpu")
    assert benchmark == f"{packages[1]} -m src.benchmarks.gpu --minutes 5 --output {tmp_path}/results/gpu.json"


@pytest.mark.slow
def test_what_a_bare_machine_runs_needs_neither_wandb_nor_datasets() -> None:
    program = (
        "import sys; sys.modules.update(wandb=None, datasets=None); import tests.gpu.test_training, src.benchmarks.gpu"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=CONFIGS.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
