"""Training on GPUs: whole runs, deterministic, compiled and on several, whose losses are those of one device."""

import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from functools import partialmethod
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import nn

from src.lut import LutStore
from src.run_directory import RunDirectory
from src.train import train
from tests.conftest import CONFIGS, small_config
from tests.distributed.test_parity import ARCHITECTURES, column
from tests.gpu.devices import devices, on_cpu, on_cuda
from tests.training.test_lightning_module import ONLY_TRAIN

SHORT = (*ONLY_TRAIN, "trainer.precision=bf16-mixed", "trainer.max_steps=6", "trainer.limit_val_batches=2")


@pytest.mark.parametrize(
    ("device", "architecture"), [on_cpu("cpu", "mole", slow=True), on_cuda("cuda", "mole"), on_cuda("cuda", "moe")]
)
def test_a_whole_run_is_deterministic(
    device: str, architecture: str, tmp_path: Path, small_overrides: Sequence[str], request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    more = ("trainer.precision=bf16-mixed", "trainer.max_steps=4", "trainer.val_check_interval=2")
    common = (*more, "trainer.log_every_n_steps=1", *ARCHITECTURES[architecture], f"trainer.accelerator={device}")
    runs = [
        train(small_config(small_overrides, tmp_path, *common, "trainer.deterministic=true", f"name={name}")).run_dir
        for name in ("first", "second")
    ]
    losses = [column(run, "train/loss") for run in runs]
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]
    assert RunDirectory(runs[0]).identity() == RunDirectory(runs[1]).identity()
    assert (runs[0] / "report.json").is_file()
    if architecture == "mole":
        LutStore.open(RunDirectory(runs[0]).lut_path()).close()


class CountWaits(lightning.Callback):
    """Notes how many warnings there were before each step, and lets a GPU warn when the host waits for it."""

    caught: list[warnings.WarningMessage]
    before: list[int]

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        self.before.append(sum("synchronizing CUDA operation" in str(warning.message) for warning in self.caught))
        if torch.cuda.is_initialized():
            torch.cuda.set_sync_debug_mode("warn")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.set_sync_debug_mode("default")


@devices(slow=True)
@pytest.mark.parametrize("architecture", ["mole", "moe"])
def test_a_step_waits_for_the_device_twice(
    device: str, architecture: str, tmp_path: Path, small_overrides: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.fit.RandomStateCallback", CountWaits)
    CountWaits.before = []
    quiet = ("trainer.log_every_n_steps=1000", "trainer.limit_val_batches=0", "trainer.max_steps=20")
    more = (*SHORT, *quiet, *ARCHITECTURES[architecture], f"trainer.accelerator={device}")
    with warnings.catch_warnings(record=True) as CountWaits.caught:
        warnings.simplefilter("always")
        train(small_config(small_overrides, tmp_path, *more))
    counts = [after - before for before, after in zip(CountWaits.before, CountWaits.before[1:], strict=False)]
    assert len(counts) == 19
    old = device == "cuda" and torch.cuda.get_device_capability() < (9, 0) and architecture == "moe"
    assert old or max(counts[3:]) <= 2, counts  # the first steps start things


@devices(slow=True)
def test_compiled_layers_train_as_eager_ones_do(
    device: str, tmp_path: Path, small_overrides: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cpu":  # where generating code takes half a minute, which `test_compile` spends
        monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    common = (*SHORT, f"trainer.accelerator={device}")
    runs = [
        train(small_config(small_overrides, tmp_path, *common, f"trainer.compile={value}", f"name={value}")).run_dir
        for value in ("false", "true")
    ]
    eager, compiled = (column(run, "train/loss") for run in runs)
    assert len(eager) == 6
    assert compiled == pytest.approx(eager, rel=2e-3)


@pytest.mark.parametrize(
    ("device", "count", "strategy", "compiled"),
    [
        on_cpu("cpu", 1, "fsdp2", False, slow=True),
        on_cuda("cuda", 1, "fsdp2", False),
        *(
            on_cuda("cuda", 2, strategy, compiled, devices=2)
            for strategy in ("ddp", "fsdp2")
            for compiled in (False, True)
        ),
    ],
)
def test_ranks_train_as_one_device_does_and_write_its_table(
    device: str, count: int, strategy: str, compiled: bool, tmp_path: Path, small_overrides: Sequence[str]
) -> None:
    common = (*SHORT, f"trainer.accelerator={device}", "data.micro_batch_size=2", "lut.at_fit_end=true")
    one = train(small_config(small_overrides, tmp_path, *common, "name=one")).run_dir
    ranks = (
        f"trainer.devices={count}",
        f"trainer.strategy={strategy}",
        f"trainer.compile={str(compiled).lower()}",
        "name=ranks",
    )
    command = [sys.executable, "-m", "src.train", *small_overrides, f"output_dir={tmp_path}", *common, *ranks]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=CONFIGS.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected, found = column(one, "train/loss"), column(tmp_path / "ranks", "train/loss")
    assert len(expected) == 6
    assert found == pytest.approx(expected, rel=2e-3)
    with LutStore.open(tmp_path / "ranks" / "lut") as mine, LutStore.open(one / "lut") as theirs:
        ids = torch.arange(512)
        torch.testing.assert_close(mine.gather(ids), theirs.gather(ids), rtol=0.05, atol=0.01)
