"""Sees to it that when one rank fails all do, and that the reason is printed once.

Stops a run, or counts, when a step's loss or gradient was not finite.
"""

import signal
import time
from subprocess import Popen
from typing import Any

import lightning
import torch

from src.data.datamodule import StepWindows
from src.errors import TrainingError
from src.run_directory import RunDirectory
from src.system.private_api import ranks_are_scripts, started_ranks
from src.system.ranks import ParentWatch, describe_failure, describe_lost, report_once
from src.system.signals import Preempted
from src.training.checkpoints import CheckpointFiles
from src.training.lightning_module import LanguageModel, StepOutput

RECORD = "failure.txt"
_LEARN_SECONDS = 3.0
_LOST_CONTACT = ("connection", "peer", "socket", "store", "broken pipe", "timed out")


class RankFailureCallback(lightning.Callback):
    """Reports a failure of ranks that are scripts of their own; forked ones raise in the process that forked them.

    List it first: it must speak before anything is taken down that other ranks wait for.
    """

    def __init__(self, run: RunDirectory) -> None:
        """Record the reason in `run`, as ranks learn it from rank 0."""
        self.record = run.path / RECORD
        self.reported = False
        """Whether the reason has been printed, here or by another rank: then it must not be printed again."""
        self._watch: ParentWatch | None = None

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Agree on where to record, and watch the parent where that is what started this rank."""
        self.record = trainer.strategy.broadcast(self.record)
        if trainer.is_global_zero:
            self.record.unlink(missing_ok=True)
        trainer.strategy.barrier("failure record")
        if ranks_are_scripts(trainer) and not started_ranks(trainer):
            self._watch = ParentWatch(self.record)
            self._watch.start()

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """No longer watch: from here on ranks end one by one."""
        self._stop_watching()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Say why, unless another rank did, and end the ranks that this process started."""
        if isinstance(exception, Preempted):
            self._stop_watching()
        if isinstance(exception, Preempted | KeyboardInterrupt) or not ranks_are_scripts(trainer):
            return
        children = started_ranks(trainer)
        report_once(self.record, self._reason(exception, trainer.global_rank, children))
        self.reported = True
        for child in children:
            child.send_signal(signal.SIGKILL)

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.stop()

    def _reason(self, exception: BaseException, rank: int, children: list[Popen[bytes]]) -> str:
        """Say what happened; a rank that lost another waits a moment to learn how that one ended."""
        if not _is_lost_contact(exception):
            return describe_failure(exception, rank)
        until = time.monotonic() + _LEARN_SECONDS
        while time.monotonic() < until and not self.record.exists():
            if self._watch is not None and self._watch.lost():
                return self._watch.reason()
            if (lost := describe_lost(children)) is not None:
                return lost
            time.sleep(0.05)
        return f"rank {rank} lost contact with another rank, which ended without a word ({exception})"


def _is_lost_contact(exception: BaseException) -> bool:
    text = str(exception).lower()
    return isinstance(exception, RuntimeError) and any(word in text for word in _LOST_CONTACT)


class NonFiniteCallback(lightning.Callback):
    """Reacts to steps that `LanguageModel` left out; list it before whatever writes checkpoints."""

    def __init__(self, run: RunDirectory, *, skip: bool) -> None:
        """Raise at the first such step, or with `skip` count them as `train/skipped_steps`."""
        self.run, self.skip = run, skip
        self.skipped_steps = 0

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Agree on the run directory."""
        self.run = trainer.strategy.broadcast(self.run)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Look at one step's outcome."""
        assert isinstance(pl_module, LanguageModel)
        output: StepOutput = outputs
        if not output["finite"]:
            if not self.skip:
                raise TrainingError(self._message(trainer, output))
            self.skipped_steps += 1
        if self.skip:
            pl_module.log("train/skipped_steps", float(self.skipped_steps))

    def state_dict(self) -> dict[str, Any]:
        """Return the count."""
        return {"skipped_steps": self.skipped_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.skipped_steps = state_dict["skipped_steps"]

    def _message(self, trainer: lightning.Trainer, output: StepOutput) -> str:
        found = [_describe_rank(trainer, output)]
        if trainer.world_size > 1:
            own, found = found[0], [(False, "")] * trainer.world_size
            torch.distributed.all_gather_object(found, own)
        guilty = [text for is_guilty, text in found if is_guilty] or [text for _, text in found]
        newest = CheckpointFiles(self.run.checkpoints_path).newest()
        good = f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"
        return (
            f"step {trainer.global_step}: not finite; gradient norm {float(output['gradient_norm'])}; "
            f"{'; '.join(guilty)}; {good}; --resume the run with trainer.non_finite=skip to leave such steps out, or "
            "start anew with a lower optimizer.learning_rate"
        )


def _describe_rank(trainer: lightning.Trainer, output: StepOutput) -> tuple[bool, str]:
    """Return whether a loss of this rank is not finite, and its losses and the windows they are of."""
    dataset: Any = getattr(trainer.train_dataloader, "dataset", None)
    bad = ~output["losses"].isfinite().cpu()
    losses = ", ".join(f"{loss:g}" for loss in output["losses"].tolist())
    text = f"rank {trainer.global_rank}: losses of its micro-batches {losses}"
    if isinstance(dataset, StepWindows):
        samples = dataset.samples(trainer.global_step - 1)  # (A, B)
        chosen = samples[bad.numpy()] if bad.any() else samples
        text += f", sample numbers {chosen.flatten().tolist()}"
    return bool(bad.any()), text
