"""What DDP keeps in memory: weights, moments, and gradients that are views of its buckets."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from src.accounting.account import whole_memory
from src.config import RunConfig
from src.fit import build_trainer
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
