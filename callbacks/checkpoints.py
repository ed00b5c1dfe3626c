"""Checkpoints on schedule, after each validation, after the last step, and when the process is told to stop.

Ends a fit with the weights of its best checkpoint.

Keeps the random generators of every rank in the checkpoint.
"""

import math
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Checkpoint

from src.run_directory import RunDirectory
from src.system.private_api import log_step_now, set_logged_step
from src.system.random_state import capture_random_state, restore_random_state
from src.system.signals import Preempted, StopSignals
from src.training.checkpoints import CheckpointFiles, best_steps
from src.training.config import CheckpointConfig

MONITORED = "val/loss"


class CheckpointCallback(Checkpoint):
    """Writes and prunes the checkpoints of a run; `last.ckpt` and `best.ckpt` name two of them.

    A checkpoint due together with a validation is written after it, so that it knows its own loss.
    """

    def __init__(self, run: RunDirectory, config: CheckpointConfig) -> None:
        """Write into `run`, as ranks learn it from rank 0."""
        self.run, self.config = run, config
        self.files = CheckpointFiles(run.checkpoints_path)
        self.losses: dict[int, float] = {}
        """Validation loss by step, of the checkpoints kept for it."""
        self.signals = StopSignals()
        self._saved_step = -1

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Agree on the run directory and clear what a killed writer left."""
        self.files = CheckpointFiles(trainer.strategy.broadcast(self.run.checkpoints_path))
        if trainer.is_global_zero:
            self.files.remove_unfinished()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Listen for signals from here on."""
        self.signals.listen()
        self._saved_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is due; when told to stop, save and stop."""
        if _validation_follows(trainer):
            return
        signum = self._agreed_signal(trainer)
        if signum:
            log_step_now(trainer)
        if signum or self._is_due(trainer):
            self.save(trainer)
        _stop(trainer, signum)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """After a checkpoint, let the metrics of its step, which are logged after it, reach the disk too."""
        set_logged_step(trainer)
        if self._saved_step == trainer.global_step:
            _flush(trainer)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save with the loss just measured."""
        if trainer.sanity_checking:
            return
        if MONITORED in trainer.callback_metrics:
            self._record(trainer.global_step, float(trainer.callback_metrics[MONITORED]))
        self.save(trainer)
        _stop(trainer, self._agreed_signal(trainer))

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Let signals end the process again: what follows training can be repeated."""
        self.signals.ignore_more()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Let signals end the process again."""
        self.signals.ignore_more()

    def state_dict(self) -> dict[str, Any]:
        """Return which steps were best so far."""
        return {"losses": self.losses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on comparing with the best steps whose checkpoints are still there."""
        on_disk = set(self.files.steps())
        self.losses = {step: loss for step, loss in state_dict["losses"].items() if step in on_disk}

    def save(self, trainer: lightning.Trainer) -> None:
        """Write the checkpoint of this step, unless it is there; then, and only then, remove older ones."""
        step = trainer.global_step
        if step == self._saved_step or trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
        _flush(trainer)
        unfinished = self.files.unfinished_path(step)
        trainer.save_checkpoint(unfinished)
        if trainer.is_global_zero:
            unfinished.replace(self.files.path(step))
            self._link_and_prune(step)
        trainer.strategy.barrier("checkpoint written")
        self._saved_step = step

    def _link_and_prune(self, step: int) -> None:
        self.files.link("last", step)
        if self.losses:
            self.files.link("best", best_steps(self.losses, 1)[0])
        self.files.prune(self.losses, keep_last=self.config.keep_last, keep_best=self.config.keep_best)

    def _record(self, step: int, loss: float) -> None:
        if not math.isfinite(loss):  # nothing is lower than what is not a number
            return
        losses = {**self.losses, step: loss}
        self.losses = {best: losses[best] for best in best_steps(losses, self.config.keep_best)}

    def _is_due(self, trainer: lightning.Trainer) -> bool:
        step, every = trainer.global_step, self.config.every_steps
        return trainer.should_stop or step >= trainer.max_steps or (every is not None and step % every == 0)

    def _agreed_signal(self, trainer: lightning.Trainer) -> int:
        """Return the signal that any rank received, the same on all of them; 0 when there is none."""
        received = torch.tensor(float(self.signals.received), device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(received, reduce_op="max"))


def _stop(trainer: lightning.Trainer, signum: int) -> None:
    if signum:
        raise Preempted(signum, trainer.global_step)


def _flush(trainer: lightning.Trainer) -> None:
    """Write out what is logged, so that a checkpoint's past survives with it."""
    for logger in trainer.loggers:
        logger.save()


def _validation_follows(trainer: lightning.Trainer) -> bool:
    """Whether Lightning validates after this step: when it is due, and before it stops (no `min_steps` is set)."""
    interval = trainer.val_check_batch
    is_due = isinstance(interval, int) and trainer.global_step % interval == 0
    return trainer.enable_validation and (is_due or trainer.should_stop)


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
