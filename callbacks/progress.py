"""Progress of a fit: a bar over its steps, speed and memory as metrics, and a limit on its time."""

import time
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.throughput import Throughput
from lightning.pytorch.callbacks import Timer, TQDMProgressBar
from torch import Tensor

from src.accounting.flops import step_flops
from src.system.hardware import matmul_rate, peak_memory_bytes, synchronize
from src.training.lightning_module import LanguageModel, StepOutput


class StepProgressBar(TQDMProgressBar):
    """One bar over all steps, without epochs and the logger's version."""

    def on_train_epoch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description("training")

    def get_metrics(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in metrics.items() if name != "v_num"}


WINDOW_STEPS = 10


class ThroughputCallback(lightning.Callback):
    """Logs speed and memory, averaged over `WINDOW_STEPS` steps without validation.

    `train/tokens_per_second` counts all devices. `train/model_flops_utilization` relates the operations that were
    executed (experts count as often as they ran) to the matrix-product rate of this device, measured before the first
    step. `train/peak_memory_bytes` is that of this process, or of its accelerator.
    """

    def __init__(self) -> None:
        self._throughput: Throughput | None = None
        self._seconds, self._tokens, self._steps, self._started = 0.0, 0, 0, 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        dtype = torch.bfloat16 if "bf16" in str(trainer.precision) else torch.float32
        rate = matmul_rate(dtype, pl_module.device)
        self._throughput = Throughput(available_flops=rate, world_size=trainer.world_size, window_size=WINDOW_STEPS)
        self._seconds, self._tokens, self._steps = 0.0, 0, 0

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock here, since validation and checkpoints between steps do not count."""
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
        assert self._throughput is not None and isinstance(pl_module, LanguageModel)
        self._steps += 1
        is_logged = self._steps % trainer.log_every_n_steps == 0  # pyright: ignore[reportAttributeAccessIssue]
        if is_logged:  # what a step leaves running is part of the next one's time, so the others need not wait
            synchronize(pl_module.device)
        micro_batches, size, length = batch.shape
        self._seconds += time.perf_counter() - self._started
        self._tokens += micro_batches * size * (length - 1)
        output: StepOutput = outputs
        shape = (micro_batches, size, length - 1)
        model, trains_backbone = pl_module.model.config, pl_module.optimizer_config.trains_backbone
        flops = int(step_flops(model, shape, int(output["computed_ids"]), trains_backbone=trains_backbone))
        self._throughput.update(
            time=self._seconds, batches=self._steps, samples=self._steps, lengths=self._tokens, flops=flops
        )
        rates = self._throughput.compute()  # holds rates once the window is full
        rate = rates.get("items_per_sec", rates.get("device/items_per_sec"))
        if rate is not None and is_logged:
            pl_module.log("train/tokens_per_second", float(rate), prog_bar=True)
            pl_module.log("train/model_flops_utilization", float(rates["device/mfu"]))
            pl_module.log("train/peak_memory_bytes", float(peak_memory_bytes(pl_module.device)))


class TimeLimit(Timer):
    """Ends training after a time, over all its resumptions."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Take no step if no time is left: Lightning's timer looks too early for states of sharded checkpoints."""
        super().on_train_start(trainer, pl_module)
        left = self.time_remaining()
        trainer.should_stop |= left is not None and left <= 0
