"""What a fit leaves behind, under a real Trainer: when it ends well, when it raises, when it is interrupted."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from safetensors.torch import load_file

from callbacks import ReparameterizeCallback, RunCallback
from src.accounting.flops import count_computed_ids
from src.config import load_run_config
from src.data.windows import StepBatch
from src.inference import load_model
from src.lut import LutStore, read_manifest
from src.run_directory import Identity, RunDirectory, hash_weights, identify
from src.train import RunResult, train
from src.training.lightning_module import LanguageModel, StepOutput
from tests.conftest import small_config
from tests.training.test_lightning_module import ONLY_TRAIN


def test_a_fit_leaves_weights_table_and_report(trained: RunResult) -> None:
    run = RunDirectory(trained.run_dir)
    backbone, experts = load_file(run.backbone_path), load_file(run.experts_path)
    assert experts
    assert all(name.startswith("experts.") for name in experts)
    assert not any("expert" in name and "shared_expert" not in name for name in backbone)
    with LutStore.open(run.lut_path()) as store:
        assert store.layout.precision == "float32"
        assert store.manifest.training_form == identify(backbone, experts).training_form
        assert store.manifest.token_counts_sha256 is not None
    report = json.loads(run.report_path.read_text())
    assert report["lookup_form"]["loss"] == pytest.approx(report["training_form"]["loss"], abs=1e-6)
    assert report["initial"]["loss"] == pytest.approx(math.log(512), abs=0.1)
    assert report["training_form"]["loss"] < report["initial"]["loss"] - 1
    assert report["table"]["bytes_per_token"] == 2 * 4 * 64 * 4
    assert set(report["corpus"]) >= {"fingerprint", "tokenizer", "train", "validation"}


def test_the_table_holds_what_the_experts_compute(trained: RunResult) -> None:
    with load_model(trained.run_dir, experts="ffn") as model, LutStore.open(trained.run_dir / "lut") as store:
        assert model.experts is not None
        ids = torch.tensor([0, 1, 17, 511])
        layer_rows = model.experts.rows(ids, model.embedding(ids))
        stored = store.gather(ids)
        for layer in range(2):
            torch.testing.assert_close(stored[:, layer], layer_rows(layer), atol=1e-6, rtol=1e-5)


class _Raises(lightning.Callback):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: object, batch_idx: int
    ) -> None:
        if trainer.global_step == 3:
            raise self.error


@pytest.mark.parametrize("error", [RuntimeError("lost"), KeyboardInterrupt()])
def test_a_fit_that_does_not_end_well_leaves_no_table(
    error: BaseException, tmp_path: Path, small_overrides: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.fit.ThroughputCallback", lambda: _Raises(error))
    config = small_config(small_overrides, tmp_path, "trainer.precision=32-true", "trainer.max_steps=8")
    with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
        train(config)
    left = {path.name for path in (tmp_path / "quickstart").rglob("*") if path.is_file()}
    assert left <= {
        "config.yaml",
        "tokenizer.json",
        "report.json",
        "held_out.safetensors",
        "metrics.csv",
        "hparams.yaml",
        "last.ckpt",
        "best.ckpt",
    }
    assert {"config.yaml", "tokenizer.json"} <= left


def test_a_failing_build_leaves_no_manifest(
    tmp_path: Path, small_overrides: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("the device fell off")

    monkeypatch.setattr("src.lut.sources.ModelRows.layer_rows", broken)
    config = small_config(small_overrides, tmp_path, "trainer.precision=32-true", "trainer.max_steps=2")
    with pytest.raises(RuntimeError, match="fell off"):
        train(config)
    lut = tmp_path / "quickstart" / "lut"
    assert not (lut / "manifest.json").exists()
    assert not list(lut.glob("rows-*.safetensors"))


def test_a_second_run_of_a_name_gets_a_number(tmp_path: Path, small_overrides: Sequence[str]) -> None:
    config = small_config(
        small_overrides,
        tmp_path,
        "trainer.precision=32-true",
        "trainer.max_steps=1",
        "lut.at_fit_end=false",
        "evaluation.at_fit_end=false",
    )
    assert [train(config).run_dir.name for _ in range(3)] == ["quickstart", "quickstart-2", "quickstart-3"]


def test_evaluation_leaves_training_as_it_was(tmp_path: Path, small_overrides: Sequence[str]) -> None:
    def final_weights(*more: str) -> Identity:
        config = small_config(small_overrides, tmp_path, "trainer.precision=32-true", "trainer.max_steps=6", *more)
        return RunDirectory(train(config).run_dir).identity()

    assert final_weights() == final_weights("evaluation.at_fit_end=false")


def test_a_fit_hashes_its_weights_once(
    tmp_path: Path, small_overrides: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[int] = []

    def counted(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
        parts.append(len(list(weights)))
        return hash_weights(weights)

    monkeypatch.setattr("src.run_directory.hash_weights", counted)
    config = small_config(
        small_overrides, tmp_path, "trainer.precision=32-true", "trainer.max_steps=1", "evaluation.at_fit_end=false"
    )
    manifest = read_manifest(RunDirectory(train(config).run_dir).lut_path())
    assert len(parts) == 2  # backbone and experts
    assert (manifest.backbone, manifest.training_form) == astuple(RunDirectory(tmp_path / "quickstart").identity())


class _Idle(LanguageModel):
    """Holds trained weights and trains no further."""

    def training_step(self, batch: StepBatch | torch.Tensor, batch_idx: int) -> StepOutput:
        return StepOutput(losses=torch.zeros(1), gradient_norm=torch.zeros(()), finite=True, computed_ids=0, signal=0)


class _Outputs(lightning.Callback):
    """Compares what a step reports with the ids in its batch."""

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LanguageModel)
        assert int(outputs["computed_ids"]) == count_computed_ids(pl_module.model.config, batch[..., :-1])


@pytest.mark.parametrize("execution", ["per_token", "unique", "unique_per_step"])
def test_a_step_reports_how_many_ids_its_experts_ran_on(
    execution: str, tmp_path: Path, small_overrides: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.fit.RandomStateCallback", _Outputs)
    options = (*ONLY_TRAIN, "trainer.max_steps=2", f"model.expert_execution={execution}")
    train(small_config(small_overrides, tmp_path, *options))


def test_steps_that_log_no_speed_do_not_wait_for_the_device(
    tmp_path: Path, small_overrides: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[torch.device] = []
    monkeypatch.setattr("callbacks.progress.synchronize", waits.append)
    more = (*ONLY_TRAIN, "trainer.max_steps=6", "trainer.log_every_n_steps=3", "trainer.limit_val_batches=0")
    train(small_config(small_overrides, tmp_path, *more))
    assert len(waits) == 2


@pytest.mark.slow
def test_two_ranks_build_the_table_of_one(tmp_path: Path, trained: RunResult) -> None:
    run = RunDirectory(trained.run_dir)
    config = load_run_config(run)
    module = _Idle(config.model, config.objective, config.optimizer, torch.ones(512, dtype=torch.int64))
    module.model.load_state_dict({**load_file(run.backbone_path), **load_file(run.experts_path)})
    manifest = read_manifest(run.lut_path())
    RunDirectory(tmp_path).write_config(run.config_values())
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_fork",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        max_epochs=1,
        callbacks=[
            run_callback := RunCallback(RunDirectory(tmp_path)),
            ReparameterizeCallback(run_callback, dtype="float32", tokenizer=manifest.tokenizer),
        ],
    )
    batches = torch.utils.data.TensorDataset(torch.zeros(2, 1, 1, 2, dtype=torch.int64))
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    shards = sorted((tmp_path / "lut").glob("rows-*"))
    assert shards
    for shard in shards:
        assert shard.read_bytes() == (run.lut_path() / shard.name).read_bytes()
