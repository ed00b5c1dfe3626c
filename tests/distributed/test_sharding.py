"""FSDP2 shares out the weights of rank 0 and trains on them as one process does, in every precision."""

import os
from collections.abc import Sequence
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from torch.distributed.device_mesh import DeviceMesh
from torch.fx import GraphModule

from src.lut import LutStore
from src.model.sharding import whole_weights
from src.run_directory import RunDirectory
from src.train import resumed_config, train
from src.training.checkpoints import read_weights
from src.training.lightning_module import LanguageModel
from src.training.strategy import ShardedStrategy
from tests.conftest import small_config
from tests.distributed.processes import run_ranks
from tests.distributed.test_parity import ARCHITECTURES, TWO, column
from tests.training.test_lightning_module import ONLY_TRAIN

BLOCK = ("model.num_kv_heads=1", "model.activation=swiglu", "model.qk_norm=true", "model.tie_embeddings=true")
"""A block of other models; its tied weights are gathered once and used twice."""
MODELS = {name: ARCHITECTURES[name] for name in ("moe", "mole")} | {
    "dense-tied": (*ARCHITECTURES["dense"], *BLOCK),
    "mole-tied": BLOCK,
}
TRIED = [pytest.param(name, marks=[pytest.mark.release] if "tied" in name else []) for name in MODELS]
SHARDED = (*TWO, "trainer.strategy=fsdp2")
ONE, UNWATCHED = "data.micro_batch_size=2", "trainer.limit_val_batches=0"


def keep_first_weights(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the weights before the first step to `path`, and on which device each rank built its model beside it."""
    configure = LanguageModel.configure_model

    def configure_model(self: LanguageModel) -> None:
        path.with_suffix(f".{self.trainer.global_rank}").write_text(str(self.model.head.weight.device))
        configure(self)

    def on_train_start(self: LanguageModel) -> None:
        weights = whole_weights(self.model, keep=True)
        if self.trainer.is_global_zero:
            torch.save(weights, path)

    monkeypatch.setattr(LanguageModel, "configure_model", configure_model)
    monkeypatch.setattr(LanguageModel, "on_train_start", on_train_start)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TRIED)
def test_ranks_start_from_the_weights_of_one_process_which_only_the_first_builds(
    architecture: str, tmp_path: Path, small_overrides: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = (*ONLY_TRAIN, UNWATCHED, *MODELS[architecture], "trainer.max_steps=2")
    writes = ("lut.at_fit_end=true", "seed=5", "name=base")
    base = train(small_config(small_overrides, tmp_path, *common, ONE, *writes)).run_dir
    for name, start in (("fresh", ()), ("from_run", (f"init_from={base}",))):
        weights: list[dict[str, torch.Tensor]] = []
        for kind, devices in (("one", (ONE,)), ("two", SHARDED)):
            path = tmp_path / f"{name}-{kind}.pt"
            with monkeypatch.context() as patch:
                keep_first_weights(path, patch)
                config = small_config(small_overrides, tmp_path, *common, *start, *devices, f"name={name}-{kind}")
                if kind == "one":
                    train(config)
                else:
                    run_ranks(partial(train, config), tmp_path / f"{name}-logs")
                    assert path.with_suffix(".0").read_text() == "cpu"
                    assert path.with_suffix(".1").read_text() == "meta"
            weights.append(torch.load(path))
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0]), name


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are float64, which `trainer.precision` does not allow here."""
    build = LanguageModel.__init__

    def build_double(self: LanguageModel, *arguments: object, **options: object) -> None:
        torch.set_default_dtype(torch.float64)
        try:
            build(self, *arguments, **options)  # type: ignore[arg-type]
        finally:
            torch.set_default_dtype(torch.float32)

    monkeypatch.setattr(LanguageModel, "__init__", build_double)


@pytest.mark.slow
@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("architecture", TRIED)
def test_losses_of_two_ranks_are_those_of_one_process_in_float64_also_when_resumed(
    architecture: str, tmp_path: Path, small_overrides: Sequence[str]
) -> None:
    constant = "optimizer.schedule=constant"
    common = (*ONLY_TRAIN, UNWATCHED, *MODELS[architecture], constant, "trainer.precision=32-true")
    train(small_config(small_overrides, tmp_path, *common, ONE, "trainer.max_steps=20", "name=one"))
    part = small_config(small_overrides, tmp_path, *common, *SHARDED, "trainer.max_steps=12", "name=two")
    run_ranks(partial(train, part), tmp_path / "logs")
    run = RunDirectory(tmp_path / "two")
    run_ranks(partial(train, resumed_config(run, None, ["trainer.max_steps=20"]), run), tmp_path / "resumed-logs")
    expected, found = column(tmp_path / "one", "train/loss"), column(run.path, "train/loss")
    assert len(expected) == 20
    assert found == pytest.approx(expected, rel=1e-10)


@pytest.mark.slow
def test_two_ranks_in_bfloat16_train_as_one_process_does_compiled_too(
    tmp_path: Path, small_overrides: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs, trace, compile_module = tmp_path / "graphs", lookup_backend("aot_eager"), nn.Module.compile

    def traced(graph: GraphModule, inputs: list[Tensor]) -> Any:
        """Trace forward and backward pass without generating code, whose threads a fork would lack."""
        with graphs.open("a") as handle:
            handle.write(f"{os.getpid()}\n")
        return trace(graph, inputs)

    monkeypatch.setattr(nn.Module, "compile", partialmethod(compile_module, backend=traced))
    common = (*ONLY_TRAIN, UNWATCHED, "trainer.max_steps=6", "trainer.precision=bf16-mixed")
    train(small_config(small_overrides, tmp_path, *common, ONE, "name=one"))
    expected = column(tmp_path / "one", "train/loss")
    assert len(expected) == 6
    for name, more in (("two", ()), ("compiled", ("trainer.compile=true",))):
        config = small_config(small_overrides, tmp_path, *common, *SHARDED, f"name={name}", *more)
        run_ranks(partial(train, config), tmp_path / f"{name}-logs")
        assert column(tmp_path / name, "train/loss") == pytest.approx(expected, rel=1e-3), name
    assert len(set(graphs.read_text().split())) == 2  # both ranks compiled


@pytest.mark.slow
@pytest.mark.usefixtures("in_float64")
def test_two_machines_with_a_copy_each_train_as_one_process_does(
    tmp_path: Path, small_overrides: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shard_mesh = ShardedStrategy.shard_mesh

    def recorded(self: ShardedStrategy) -> DeviceMesh:
        mesh = shard_mesh(self)
        (tmp_path / f"mesh-{self.global_rank}").write_text(f"{mesh.shape} {mesh.get_coordinate()}")
        return mesh

    monkeypatch.setattr(ShardedStrategy, "shard_mesh", recorded)
    common = (*ONLY_TRAIN, UNWATCHED, "optimizer.schedule=constant", "trainer.precision=32-true", "lut.at_fit_end=true")
    train(small_config(small_overrides, tmp_path, *common, ONE, "trainer.max_steps=6", "name=one"))
    four = ("trainer.devices=2", "trainer.num_nodes=2", "trainer.strategy=fsdp2", "data.micro_batch_size=1")
    part = ("trainer.max_steps=3", "checkpoint.sharded=true", "name=four")
    run_ranks(partial(train, small_config(small_overrides, tmp_path, *common, *four, *part)), tmp_path / "logs", 2)
    places = [(tmp_path / f"mesh-{rank}").read_text() for rank in range(4)]
    assert places == [f"(2, 2) {place}" for place in ("(0, 0)", "(0, 1)", "(1, 0)", "(1, 1)")]
    run = RunDirectory(tmp_path / "four")
    more = resumed_config(run, None, ["trainer.max_steps=6", "checkpoint.sharded=false"])
    run_ranks(partial(train, more, run), tmp_path / "resumed-logs", 2)
    expected, found = column(tmp_path / "one", "train/loss"), column(run.path, "train/loss")
    assert len(expected) == 6
    assert found == pytest.approx(expected, rel=1e-10)
    one = RunDirectory(tmp_path / "one")
    for name, theirs in load_file(one.backbone_path).items():
        torch.testing.assert_close(load_file(run.backbone_path)[name], theirs, rtol=1e-9, atol=1e-12)
    assert read_weights(run.checkpoints_path / "last.ckpt").keys() == {
        *load_file(run.backbone_path),
        *load_file(run.experts_path),
    }
    with LutStore.open(run.lut_path()) as mine, LutStore.open(one.lut_path()) as theirs:
        ids = torch.arange(512)
        torch.testing.assert_close(mine.gather(ids), theirs.gather(ids))
