"""Lightning's progress bar, counting optimiser steps and showing what matters."""

from typing import Any

import lightning
from lightning.pytorch.callbacks import TQDMProgressBar


class StepProgressBar(TQDMProgressBar):
    """One bar over all steps: there are no epochs to speak of, and no logger version."""

    def on_train_epoch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Name the bar."""
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description("training")

    def get_metrics(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> dict[str, Any]:
        """Return the metrics to show, without the logger's version."""
        metrics = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in metrics.items() if name != "v_num"}
