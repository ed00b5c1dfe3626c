"""Keeps the random generators of every rank in the checkpoint."""

from typing import Any

import lightning
import torch

from src.checkpointing.random_state import capture_random_state, restore_random_state

_KEY = "random_states"


class RandomStateCallback(lightning.Callback):
    """Saves and restores random states; ranks that a checkpoint knows nothing of begin from the run's seed.

    List it first: they are restored when training starts, after whatever was drawn to get there.
    """

    def __init__(self) -> None:
        """Restore nothing unless a checkpoint is loaded."""
        self._loaded: dict[str, Any] | None = None

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the states of all ranks."""
        states: list[dict[str, Any]] = [capture_random_state()]
        if trainer.world_size > 1:
            own, states = states[0], [{} for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(states, own)
        checkpoint[_KEY] = states

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take this rank's state."""
        states = checkpoint.get(_KEY, [])
        self._loaded = states[trainer.global_rank] if trainer.global_rank < len(states) else None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Restore it."""
        if self._loaded is not None:
            restore_random_state(self._loaded)
            self._loaded = None
