"""Which checkpoints a run writes and when, what they hold of random generators, and the best one as a fit's result."""

import math
import time
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Checkpoint, WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn

from callbacks.failures import RunCallback
from src.system.private_api import log_step_now, set_logged_step, validate_now
from src.system.random_state import capture_random_state, restore_random_state
from src.system.signals import StopSignals
from src.training.checkpoints import CheckpointFiles, best_steps
from src.training.config import CheckpointConfig
from src.training.lightning_module import StepOutput

MONITORED = "val/loss"
LONG_SECONDS = 4.0
"""A validation that takes longer is not waited for after a stop signal, so its step's checkpoint is written first."""


class CheckpointCallback(Checkpoint):
    """Writes and prunes the checkpoints of a run; the links `last.ckpt` and `best.ckpt` name two of them.

    Steps are held together: a stop signal that comes during one is acted on when its checkpoint is written. A
    checkpoint due together with a validation is written after it, with its loss. The first validation, and each that
    follows a long one, is also preceded by a checkpoint, which says that the validation is still to be run.
    """

    def __init__(self, run: RunCallback, config: CheckpointConfig, signals: StopSignals) -> None:
        self.run, self.config, self.signals = run, config, signals
        self.losses: dict[int, float] = {}
        """Validation loss by step, of the checkpoints kept for it."""
        self._saved_step = -1
        self._validation_pending = False
        self._validation_began, self._validation_seconds = 0.0, math.inf

    @property
    def files(self) -> CheckpointFiles:
        """Where the checkpoints are."""
        return CheckpointFiles(self.run.directory.checkpoints_path)

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Remove what a killed writer left."""
        if trainer.is_global_zero:
            self.files.remove_unfinished()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Point the links at what is loaded, as a writer may have ended before them; run the validation it lacks."""
        self.losses = trainer.strategy.broadcast(self.losses)  # ranks may see different files
        self._saved_step = trainer.global_step
        if trainer.is_global_zero and trainer.global_step in self.files.steps():
            self._link(trainer.global_step)
        if self._validation_pending:
            validate_now(trainer)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Hold the step together."""
        set_logged_step(trainer)
        if self._saved_step == trainer.global_step:
            _flush(trainer)  # the metrics of the saved step, which are logged after its checkpoint
        self.signals.hold()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is due; after a stop signal, save and stop."""
        output: StepOutput = outputs
        signum, self._validation_pending = output["signal"], _validation_follows(trainer)
        if signum:
            log_step_now(trainer)
        is_long = self._validation_pending and self._validation_seconds > LONG_SECONDS
        if signum or is_long or (self._is_due(trainer) and not self._validation_pending):
            self.save(trainer)
        if signum:
            self.signals.stop(signum, trainer.global_step)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Let a signal end the validation if the checkpoint of its step is written."""
        self._validation_began = time.monotonic()
        if self._saved_step == trainer.global_step and not trainer.sanity_checking:
            _flush(trainer)
            self.signals.release()

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save with the loss just measured."""
        if trainer.sanity_checking:
            return
        if MONITORED in trainer.callback_metrics:
            self._record(trainer.global_step, float(trainer.callback_metrics[MONITORED]))
        self._validation_pending, self._saved_step = False, -1
        self.save(trainer)
        seconds = time.monotonic() - self._validation_began
        signum, self._validation_seconds = _largest(trainer, self.signals.received, seconds)
        if signum:
            self.signals.stop(int(signum), trainer.global_step)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """After the last step, let signals end the process: `--resume` repeats what follows."""
        _flush(trainer)
        self.signals.release()

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses, "validation_pending": self._validation_pending}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best steps whose checkpoints still exist."""
        on_disk = set(self.files.steps())
        self.losses = {step: loss for step, loss in state_dict["losses"].items() if step in on_disk}
        self._validation_pending = state_dict.get("validation_pending", False)

    def save(self, trainer: lightning.Trainer) -> None:
        """Write the checkpoint of this step, unless it exists; then, and only then, remove older ones."""
        step = trainer.global_step
        if step == self._saved_step or trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
        _flush(trainer)
        unfinished = self.files.unfinished_path(step)
        trainer.save_checkpoint(unfinished)
        if trainer.is_global_zero:
            self.files.publish(step)
            self._link(step)
            self.files.prune(self.losses, keep_last=self.config.keep_last, keep_best=self.config.keep_best)
        trainer.strategy.barrier("checkpoint written")
        self._saved_step = step

    def _link(self, step: int) -> None:
        self.files.link("last", step)
        if self.losses:
            self.files.link("best", best_steps(self.losses, 1)[0])

    def _record(self, step: int, loss: float) -> None:
        if not math.isfinite(loss):  # nothing compares as lower than NaN
            return
        losses = {**self.losses, step: loss}
        self.losses = {best: losses[best] for best in best_steps(losses, self.config.keep_best)}

    def _is_due(self, trainer: lightning.Trainer) -> bool:
        step, every = trainer.global_step, self.config.every_steps
        return trainer.should_stop or step >= trainer.max_steps or (every is not None and step % every == 0)


def _largest(trainer: lightning.Trainer, *values: float) -> list[float]:
    """Return the largest of each value over all ranks, the same on all of them."""
    if trainer.world_size == 1:
        return list(values)
    own = torch.tensor(values, device=trainer.strategy.root_device)
    return trainer.strategy.reduce(own, reduce_op="max").tolist()


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
    """Loads the checkpoint of the lowest validation loss; list it before callbacks that write the weights."""

    def __init__(self, checkpoints: CheckpointCallback) -> None:
        self.checkpoints = checkpoints

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Load it; without a validation there is no best one, and the last weights stay."""
        best = best_steps(self.checkpoints.losses, 1)
        if best:
            path = self.checkpoints.files.path(best[0])
            trainer.strategy.load_model_state_dict(trainer.strategy.load_checkpoint(path, weights_only=True))


class AveragedWeights(WeightAveraging):
    """Keeps an exponential moving average of the weights, which validation, checkpoints and results use."""

    def __init__(self, decay: float) -> None:
        super().__init__(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(decay))

    @property
    def state_key(self) -> str:
        """Return the name that older checkpoints use."""
        return "EMAWeightAveraging"


_KEY = "random_states"


class RandomStateCallback(lightning.Callback):
    """Saves and restores random states; ranks that a checkpoint does not know start from the run's seed.

    List it before callbacks that draw random numbers: states are restored when training starts.
    """

    def __init__(self) -> None:
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
        if self._loaded is not None:
            restore_random_state(self._loaded)
            self._loaded = None
