"""Which weights a run ends with, and what happens when they are no numbers any more."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from src import reparameterize
from src.errors import TrainingError
from src.lut import LutStore
from src.run_directory import RunDirectory, identify
from src.train import resumed_config, train
from src.training.checkpoints import CheckpointFiles, read_weights
from src.training.lightning_module import LanguageModel
from tests.conftest import small_config
from tests.training.test_lightning_module import ONLY_TRAIN, read_metrics

TRAIN = (
    "evaluation.at_fit_end=false",
    "evaluation.dashboard=false",
    "trainer.precision=32-true",
    "trainer.log_every_n_steps=1",
)


def written(run: Path) -> dict[str, Tensor]:
    """The training form that a run wrote, which its table says it was built from."""
    backbone, experts = load_file(run / "backbone.safetensors"), load_file(run / "experts.safetensors")
    with LutStore.open(run / "lut") as store:
        assert store.manifest.training_form == identify(backbone, experts).training_form
    return {**backbone, **experts}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_table_can_be_of_the_best_weights(tmp_path: Path, small_overrides: Sequence[str]) -> None:
    # the learning rate is ruinous after the warm-up, so that an early checkpoint is the best one
    ruin = ("optimizer.learning_rate=5.0", "optimizer.warmup_steps=100", "trainer.val_check_interval=4")
    keep = ("checkpoint.final_weights=best", "checkpoint.keep_last=2", "checkpoint.every_steps=6")
    run = train(
        small_config(small_overrides, tmp_path, *TRAIN, *ruin, *keep, "trainer.max_steps=26", "model.num_layers=1")
    ).run_dir
    losses = {int(row["step"]) + 1: float(row["val/loss"]) for row in read_metrics(run) if row.get("val/loss")}
    best = min(losses, key=lambda step: losses[step])
    files = CheckpointFiles(run / "checkpoints")
    assert best < 24
    assert files.steps() == [best, 24, 26]
    assert (run / "checkpoints" / "best.ckpt").resolve() == files.path(best).resolve()
    assert same(written(run), read_weights(files.path(best)))
    assert not same(written(run), read_weights(files.path(26)))
    reparameterize.main(["--run", str(run), "--checkpoint", "last", "--overwrite"])
    assert same(written(run), read_weights(files.path(26)))


def test_the_table_is_of_averaged_weights_and_training_is_not(tmp_path: Path, small_overrides: Sequence[str]) -> None:
    common = (*TRAIN, "trainer.max_steps=3", "optimizer.warmup_steps=0", "trainer.val_check_interval=2")
    every = ("checkpoint.every_steps=1", "checkpoint.keep_last=9")
    plain = train(small_config(small_overrides, tmp_path, *common, *every, "name=plain")).run_dir
    averaged = train(small_config(small_overrides, tmp_path, *common, "checkpoint.ema_decay=0.75", "name=ema")).run_dir
    first, second, third = (read_weights(CheckpointFiles(plain / "checkpoints").path(step)) for step in (1, 2, 3))
    found = written(averaged)
    for name, weight in found.items():  # the first step begins the average
        expected = 0.75 * (0.75 * first[name] + 0.25 * second[name]) + 0.25 * third[name]
        torch.testing.assert_close(weight, expected, atol=1e-6, rtol=1e-5)
    losses = [[row["train/loss"] for row in read_metrics(run) if row.get("train/loss")] for run in (plain, averaged)]
    assert losses[0] == losses[1]
    assert same(found, read_weights(averaged / "checkpoints" / "last.ckpt"))


def inject_nan(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    losses = LanguageModel._losses

    def broken(self: LanguageModel, *arguments: object, **options: object) -> tuple[Tensor, Tensor]:
        loss, objective = losses(self, *arguments, **options)  # type: ignore[arg-type]
        return loss, objective * (float("nan") if self.trainer.global_step == step - 1 else 1)

    monkeypatch.setattr(LanguageModel, "_losses", broken)


def test_a_gradient_that_is_no_number_stops_the_run(
    tmp_path: Path, small_overrides: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inject_nan(monkeypatch, 7)
    with pytest.raises(TrainingError) as stopped:
        train(small_config(small_overrides, tmp_path, *ONLY_TRAIN, "checkpoint.every_steps=5", "trainer.max_steps=9"))
    last = tmp_path / "quickstart" / "checkpoints" / "step-00000005.ckpt"
    for part in ("step 7: not finite; gradient norm nan", f"the last good checkpoint is {last}"):
        assert part in str(stopped.value)
    assert f"sample numbers {list(range(48, 56))}" in str(stopped.value)
    assert CheckpointFiles(last.parent).newest() == last


def test_such_a_step_can_be_left_out_and_is_counted(
    tmp_path: Path, small_overrides: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    every = ("checkpoint.every_steps=1", "checkpoint.keep_last=9", "trainer.non_finite=skip")
    inject_nan(monkeypatch, 7)
    run = train(small_config(small_overrides, tmp_path, *ONLY_TRAIN, *every, "trainer.max_steps=8")).run_dir
    files = CheckpointFiles(run / "checkpoints")
    before, left_out, after = (read_weights(files.path(step)) for step in (6, 7, 8))
    assert same(before, left_out)
    assert not same(left_out, after)
    counted = [float(row["train/skipped_steps"]) for row in read_metrics(run) if row.get("train/skipped_steps")]
    assert counted == [0] * 6 + [1] * 2
    again = RunDirectory(run)
    train(resumed_config(again, None, ["trainer.max_steps=9"]), again)
    assert float(read_metrics(run)[-1]["train/skipped_steps"] or read_metrics(run)[-2]["train/skipped_steps"]) == 1
