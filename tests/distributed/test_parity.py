"""However many devices hold a model, and however they share it, training and the table are those of one process."""

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from src.checkpointing.files import CheckpointFiles
from src.checkpointing.weights import read_weights
from src.config import load_run_config
from src.lut import LutStore, builder
from src.run_directory import RunDirectory
from src.train import resumed_config, train
from tests.conftest import small_config
from tests.distributed.processes import run_ranks
from tests.test_lightning_module import ONLY_TRAIN, read_metrics

ARCHITECTURES = {
    "dense": ("model.num_experts=0", "model.expert_intermediate_size=0"),
    "moe": ("model.expert_input=hidden", "model.top_k=2", "model.intermediate_size=0"),
    "mole": (),
}
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
        config = small_config(small_overrides, tmp_path, *common, *TWO, strategy, f"name={name}")
        run_ranks(partial(train, config), tmp_path / f"{name}-logs")
        for metric, count in (("train/loss", 20), ("val/loss", 2), ("train/gradient_norm", 20)):
            expected, found = column(tmp_path / "alone", metric), column(tmp_path / name, metric)
            assert len(expected) == count
            assert found == pytest.approx(expected, abs=1e-6 if "loss" in metric else 1e-5), (name, metric)


@pytest.mark.slow
def test_every_strategy_builds_the_same_table(
    tmp_path: Path, small_overrides: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("callbacks.reparameterize.builder.plan", partial(builder.plan, shard_bytes=2**18))
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
    constant = (*common, "optimizer.schedule=constant")
    whole = small_config(small_overrides, tmp_path, *constant, "trainer.max_steps=12", "name=whole")
    run_ranks(partial(train, whole), tmp_path / "whole-logs")
    part = small_config(small_overrides, tmp_path, *constant, "trainer.max_steps=6", "name=part")
    run_ranks(partial(train, part), tmp_path / "part-logs")
    run = RunDirectory(tmp_path / "part")
    run_ranks(partial(train, resumed_config(run, None, ["trainer.max_steps=12"]), run), tmp_path / "resumed-logs")
    assert column(run.path, "train/loss") == column(tmp_path / "whole", "train/loss")
    assert (run.checkpoints_path / "last.ckpt").is_dir() == sharded
    weights = read_weights(run.checkpoints_path / "last.ckpt")
    config = load_run_config(run).model
    assert weights["embedding.weight"].shape == (config.vocab_size, config.hidden_size)
    other = read_weights(tmp_path / "whole" / "checkpoints" / "last.ckpt")
    assert weights.keys() == other.keys()
    assert all(torch.equal(weights[name], other[name]) for name in weights)
