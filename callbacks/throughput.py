"""Tokens per second, from Lightning's `Throughput`, under names that say so."""

import time
from typing import Any

import lightning
from lightning.fabric.utilities.throughput import Throughput
from torch import Tensor

WINDOW_STEPS = 10


class ThroughputCallback(lightning.Callback):
    """Logs `train/tokens_per_second` over all devices, averaged over `WINDOW_STEPS` steps without validation."""

    def __init__(self) -> None:
        """Start counting with the fit."""
        self._throughput: Throughput | None = None
        self._seconds, self._tokens, self._steps, self._started = 0.0, 0, 0, 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Forget what an earlier fit counted."""
        self._throughput = Throughput(world_size=trainer.world_size, window_size=WINDOW_STEPS)
        self._seconds, self._tokens, self._steps = 0.0, 0, 0

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock: validation and checkpoints between steps are not training."""
        self._started = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Tensor,
        batch_idx: int,
    ) -> None:
        """Add one step of (A, B, T+1) windows and log on logging steps."""
        assert self._throughput is not None
        micro_batches, size, length = batch.shape
        self._seconds += time.perf_counter() - self._started
        self._tokens += micro_batches * size * (length - 1)
        self._steps += 1
        self._throughput.update(time=self._seconds, batches=self._steps, samples=self._steps, lengths=self._tokens)
        rates = self._throughput.compute()  # holds rates once the window is full
        rate = rates.get("global/items_per_sec", rates.get("device/items_per_sec"))
        if rate is not None and self._steps % trainer.log_every_n_steps == 0:  # pyright: ignore[reportAttributeAccessIssue]
            pl_module.log("train/tokens_per_second", float(rate), prog_bar=True)
