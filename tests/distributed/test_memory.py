"""What ranks keep: under DDP gradients are views of its buckets, under FSDP2 only the first holds a whole model."""

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader, Dataset

from src.accounting.account import count_parameters, whole_memory
from src.benchmarks.memory_use import peak_bytes
from src.config import RunConfig
from src.fit import build_trainer
from src.model import ModelConfig, Transformer
from src.model.sharding import shard_from_rank_zero
from src.training.config import ObjectiveConfig
from src.training.lightning_module import LanguageModel
from tests.conftest import small_config
from tests.distributed.processes import run_ranks


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Return the bytes of each distinct storage by its address."""
    found = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


class WatchGradients(lightning.Callback):
    """Finds after each backward pass which storages hold gradients, and after each step the bytes of everything."""

    def __init__(self) -> None:
        self.gradients: list[set[int]] = []
        self.kept_bytes: list[int] = []

    def on_after_backward(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.gradients.append(set(storages(p.grad for p in pl_module.parameters() if p.grad is not None)))

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any, **__: Any
    ) -> None:
        states = trainer.optimizers[0].state.values()
        moments = [value for state in states for value in state.values() if value.dim()]
        weights = list(pl_module.parameters())
        found = storages([*weights, *moments, *(weight.grad for weight in weights if weight.grad is not None)])
        self.kept_bytes.append(sum(found.values()))


def keep_in_buckets(config: RunConfig) -> None:
    torch.manual_seed(0)
    module = LanguageModel(
        config.model, ObjectiveConfig(), config.optimizer, torch.ones(config.model.vocab_size).long()
    )
    batch = torch.randint(config.model.vocab_size, (3, 2, 17))  # 3 micro-batches
    dataset: Dataset[Tensor] = [batch] * config.trainer.max_steps  # type: ignore[assignment]
    watch = WatchGradients()
    build_trainer(config, [watch], []).fit(module, DataLoader(dataset, batch_size=None))
    buckets = watch.gradients[2]  # after the exchange of the first step
    assert len(buckets) < sum(1 for _ in module.parameters())
    assert len(watch.gradients) == 3 * config.trainer.max_steps
    assert all(found == buckets for found in watch.gradients)
    stated = whole_memory(sum(weight.numel() for weight in module.parameters()), "32-true").total
    assert watch.kept_bytes == pytest.approx([stated] * config.trainer.max_steps, rel=0.01)


@pytest.mark.slow
def test_gradients_are_views_of_the_buckets_in_every_micro_batch(
    tmp_path: Path, small_overrides: Sequence[str]
) -> None:
    short = ("trainer.max_steps=3", "trainer.precision=32-true", "trainer.limit_val_batches=0")
    more = ("trainer.devices=2", "trainer.strategy=ddp", "data.micro_batch_size=2", *short)
    run_ranks(partial(keep_in_buckets, small_config(small_overrides, tmp_path, *more)), tmp_path / "logs")


DEEP = ModelConfig(
    vocab_size=2048,
    hidden_size=256,
    num_layers=16,
    num_heads=4,
    intermediate_size=512,
    num_experts=4,
    expert_intermediate_size=1024,
)


def build_and_share_out(path: Path) -> None:
    """Write by how much this rank's memory grows at most, as a share of all weights."""
    rank, device = int(os.environ["LOCAL_RANK"]), torch.device("cpu")
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    mesh, kept = init_device_mesh("cpu", (2,)), list[Transformer]()

    def build(config: ModelConfig) -> None:
        with torch.device("meta" if rank else "cpu"):
            kept.append(Transformer(config))
        shard_from_rank_zero(kept[-1], mesh, device)

    build(replace(DEEP, num_layers=1))  # what is imported and allocated once is no part of a model
    weights = 4 * count_parameters(DEEP).trained
    path.with_suffix(f".{rank}").write_text(str((peak_bytes(partial(build, DEEP), device) or 0) / weights))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a process")
def test_a_rank_that_receives_its_part_never_holds_the_whole_model(tmp_path: Path) -> None:
    run_ranks(partial(build_and_share_out, tmp_path / "grown"), tmp_path / "logs")
    shares = [float((tmp_path / f"grown.{rank}").read_text()) for rank in (0, 1)]
    assert shares[0] > 1
    assert 0.5 <= shares[1] <= 0.75  # its half, a tensor on its way, and what the allocator keeps
