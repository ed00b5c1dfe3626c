"""Ends a fit with the weights of its best checkpoint."""

import lightning

from callbacks.checkpoints import CheckpointCallback
from src.checkpointing.files import best_steps


class BestWeightsCallback(lightning.Callback):
    """Loads the checkpoint of the lowest validation loss; list it before whatever writes the weights."""

    def __init__(self, checkpoints: CheckpointCallback) -> None:
        """Take the best of `checkpoints`."""
        self.checkpoints = checkpoints

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Load it; without a validation there is no best one, and the last weights stay."""
        best = best_steps(self.checkpoints.losses, 1)
        if best:
            path = self.checkpoints.files.path(best[0])
            trainer.strategy.load_model_state_dict(trainer.strategy.load_checkpoint(path, weights_only=True))
