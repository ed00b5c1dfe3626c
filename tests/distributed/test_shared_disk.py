"""Ranks on several machines: one may not see yet what another has just written, as NFS allows for a minute."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from src.config import RunConfig
from src.lut import LutStore
from src.run_directory import RunDirectory
from src.train import resumed_config, train
from src.training.checkpoints import CheckpointFiles
from tests.conftest import small_config
from tests.distributed.processes import run_ranks
from tests.distributed.test_parity import column

TWO = ("trainer.devices=2", "trainer.strategy=ddp", "data.micro_batch_size=2", "data.validation_windows=4")
SHORT = ("trainer.precision=32-true", "evaluation.dashboard=false", "evaluation.tasks=[]", "trainer.max_steps=2")
STALE_READS = 2


def hide(name: str) -> None:
    """Let this process see a file late: no look finds it, and neither do the first attempts to open it."""
    is_file, exists, read_bytes = Path.is_file, Path.exists, Path.read_bytes
    attempts = iter(range(STALE_READS))

    def stale_read(self: Path) -> bytes:
        if self.name == name and next(attempts, None) is not None:
            raise FileNotFoundError(self)
        return read_bytes(self)

    Path.is_file = lambda path: path.name != name and is_file(path)  # pyright: ignore[reportAttributeAccessIssue]
    Path.exists = lambda path: path.name != name and exists(path)  # pyright: ignore[reportAttributeAccessIssue]
    Path.read_bytes = stale_read


def rank(config: RunConfig, hidden: str) -> None:
    if os.environ["LOCAL_RANK"] == "1":
        hide(hidden)
    train(config)


@pytest.mark.slow
@pytest.mark.parametrize("hidden", ["manifest.json", "plan.json"])
def test_a_rank_that_sees_a_table_late_still_evaluates_it(
    hidden: str, tmp_path: Path, small_overrides: Sequence[str]
) -> None:
    config = small_config(small_overrides, tmp_path, *TWO, *SHORT, "name=run")
    run_ranks(partial(rank, config, hidden), tmp_path / "logs")
    run = RunDirectory(tmp_path / "run")
    assert run.record()["table"]["directory"] == "lut"
    LutStore.open(run.lut_path()).close()


def resume(run: RunDirectory, seen: Sequence[int]) -> None:
    if os.environ["LOCAL_RANK"] == "1":
        CheckpointFiles.steps = lambda _: list(seen)  # pyright: ignore[reportAttributeAccessIssue]
    train(resumed_config(run, None, [*TWO, "trainer.max_steps=4"]), run)


@pytest.mark.slow
@pytest.mark.parametrize("seen", [[1], []], ids=["an older checkpoint", "none"])
def test_ranks_resume_from_the_checkpoint_that_rank_zero_sees(
    seen: Sequence[int], tmp_path: Path, small_overrides: Sequence[str]
) -> None:
    steps = ("checkpoint.every_steps=1", "checkpoint.keep_last=3", "trainer.log_every_n_steps=1")
    common = (*SHORT, *steps, "lut.at_fit_end=false", "evaluation.at_fit_end=false", "data.micro_batch_size=2")
    train(small_config(small_overrides, tmp_path, *common, "name=run"))
    train(small_config(small_overrides, tmp_path, *common, "name=alone", "trainer.max_steps=4"))
    run_ranks(partial(resume, RunDirectory(tmp_path / "run"), seen), tmp_path / "logs")
    found, expected = (column(tmp_path / name, "train/loss") for name in ("run", "alone"))
    assert list(found) == [0, 1, 2, 3]
    assert found == pytest.approx(expected, abs=1e-6)
