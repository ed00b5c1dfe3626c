"""However many devices hold a model, and however they share it, training and the table are those of one process."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, cast, get_args

import lightning
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from src.config import load_run_config
from src.lut import LutStore, build_lut
from src.run_directory import RunDirectory
from src.train import resumed_config, train
from src.training.checkpoints import CheckpointFiles, read_weights
from src.training.config import ObjectiveConfig, OptimizerConfig
from src.training.lightning_module import LanguageModel
from tests.conftest import small_config
from tests.distributed.processes import run_ranks
from tests.model.test_step_rows import CONFIG
from tests.training.test_lightning_module import ONLY_TRAIN, read_metrics

ARCHITECTURES = {
    "dense": ("model.num_experts=0", "model.expert_intermediate_size=0"),
    "moe": ("model.expert_input=hidden", "model.top_k=2", "model.intermediate_size=0"),
    "mole": (),
    "some-layers": ("model.expert_layers=[1]", "model.null_expert=true"),
    "frozen": ("model.expert_layers=[1]", "optimizer.backbone_multipliers.learning_rate=0"),
}
Execution = Literal["per_token", "unique", "unique_per_step"]
STRATEGIES = {"ddp": "trainer.strategy=ddp", "fsdp2": "trainer.strategy=fsdp2"}
TWO = ("trainer.devices=2", "data.micro_batch_size=2")


def column(run: Path, name: str) -> dict[int, float]:
    return {int(row["step"]): float(row[name]) for row in read_metrics(run) if row.get(name)}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_ranks_reproduce_one_process(architecture: str, tmp_path: Path, small_overrides: Sequence[str]) -> None:
    common = (*ONLY_TRAIN, *ARCHITECTURES[architecture], "trainer.max_steps=20", "trainer.val_check_interval=10")
    common = (
        *common,
        "data.validation_windows=9",
    )  # one rank has five of them, in three batches, the other four in two
    train(small_config(small_overrides, tmp_path, *common, "data.micro_batch_size=2", "name=alone"))
    for name, strategy in STRATEGIES.items():
        if (architecture, name) == ("frozen", "fsdp2"):  # refused
            continue
        config = small_config(small_overrides, tmp_path, *common, *TWO, strategy, f"name={name}")
        run_ranks(partial(train, config), tmp_path / f"{name}-logs")
        for metric, count in (("train/loss", 20), ("val/loss", 2), ("train/gradient_norm", 20)):
            expected, found = column(tmp_path / "alone", metric), column(tmp_path / name, metric)
            assert len(expected) == count
            assert found == pytest.approx(expected, abs=1e-6 if "loss" in metric else 1e-5), (name, metric)


class KeepGradients(lightning.Callback):
    """Writes what the optimizer just used, from the first rank."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.is_global_zero:
            torch.save({name: value.grad for name, value in pl_module.named_parameters()}, self.path)


def one_step(execution: Execution, devices: int, path: Path) -> None:
    """Take one optimizer step on 8 windows, as 8 / `devices` micro-batches of one on each rank, in float64."""
    torch.manual_seed(0)
    model = replace(CONFIG, expert_execution=execution, init_std=0.2)
    optimizer = OptimizerConfig(gradient_clip_norm=0)
    module = LanguageModel(model, ObjectiveConfig(load_balance_weight=0.01), optimizer, torch.ones(40).long())
    windows = torch.randint(40, (8, 1, 9))
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        precision="64-true",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[KeepGradients(path)],
    )
    mine = windows[trainer.global_rank :: devices]  # (8 / devices, 1, 9)
    trainer.fit(module, DataLoader(cast(Dataset[Tensor], [mine]), batch_size=None))


@pytest.mark.slow
def test_every_execution_gives_the_same_gradients_on_one_rank_and_on_two(tmp_path: Path) -> None:
    executions: tuple[Execution, ...] = get_args(Execution)
    paths: dict[tuple[Execution, int], Path] = {
        (name, devices): tmp_path / f"{name}-{devices}.pt" for name in executions for devices in (1, 2)
    }
    for (execution, devices), path in paths.items():
        step = partial(one_step, execution, devices, path)
        if devices == 1:
            step()
        else:
            run_ranks(step, tmp_path / f"{execution}-logs")
    expected = torch.load(paths["per_token", 1])
    assert all(gradient.dtype == torch.float64 and gradient.abs().max() > 1e-6 for gradient in expected.values())
    for path in paths.values():
        for name, gradient in torch.load(path).items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-10, rtol=0, msg=f"{path.name}: {name}")


@pytest.mark.slow
def test_every_strategy_builds_the_same_table(
    tmp_path: Path, small_overrides: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("callbacks.reparameterize.build_lut", partial(build_lut, shard_bytes=2**18))
    # the best checkpoint is that of step 10, whatever the step after it does, so all tables are of its weights
    best = (
        "checkpoint.final_weights=best",
        "evaluation.dashboard=false",
        "evaluation.at_fit_end=false",
        "trainer.val_check_interval=10",
    )
    begun = small_config(small_overrides, tmp_path, *best, "trainer.precision=32-true", "trainer.max_steps=10")
    original = train(begun).run_dir
    tables: dict[str, list[bytes]] = {}
    for name, more in {"one": (), **{name: (*TWO, strategy) for name, strategy in STRATEGIES.items()}}.items():
        run = RunDirectory(tmp_path / name)
        shutil.copytree(original, run.path)
        shutil.rmtree(run.lut_path())
        go_on = partial(train, resumed_config(run, None, ["trainer.max_steps=11", *more]), run)
        if name == "one":
            go_on()
        else:
            run_ranks(go_on, tmp_path / f"{name}-logs")
        assert CheckpointFiles(run.checkpoints_path).steps() == [10, 11]
        LutStore.open(run.lut_path()).close()
        tables[name] = [path.read_bytes() for path in sorted(run.lut_path().glob("rows-*"))]
    assert len(tables["one"]) > 2
    assert tables["one"] == tables["ddp"] == tables["fsdp2"]
    assert tables["one"] == [path.read_bytes() for path in sorted((original / "lut").glob("rows-*"))]


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_a_sharded_run_goes_on_as_if_it_had_not_stopped(
    sharded: bool, tmp_path: Path, small_overrides: Sequence[str]
) -> None:
    common = (*ONLY_TRAIN, *TWO, "trainer.strategy=fsdp2", f"checkpoint.sharded={str(sharded).lower()}")
    constant = (*common, "optimizer.schedule=constant", "trainer.limit_val_batches=0")
    whole = small_config(small_overrides, tmp_path, *constant, "trainer.max_steps=6", "name=whole")
    run_ranks(partial(train, whole), tmp_path / "whole-logs")
    part = small_config(small_overrides, tmp_path, *constant, "trainer.max_steps=3", "name=part")
    run_ranks(partial(train, part), tmp_path / "part-logs")
    run = RunDirectory(tmp_path / "part")
    run_ranks(partial(train, resumed_config(run, None, ["trainer.max_steps=6"]), run), tmp_path / "resumed-logs")
    assert len(column(run.path, "train/loss")) == 6
    assert column(run.path, "train/loss") == column(tmp_path / "whole", "train/loss")
    assert (run.checkpoints_path / "last.ckpt").is_dir() == sharded
    weights = read_weights(run.checkpoints_path / "last.ckpt")
    config = load_run_config(run).model
    assert weights["embedding.weight"].shape == (config.vocab_size, config.hidden_size)
    other = read_weights(tmp_path / "whole" / "checkpoints" / "last.ckpt")
    assert weights.keys() == other.keys()
    assert all(torch.equal(weights[name], other[name]) for name in weights)
