"""What holds the ranks of a fit together: one run directory, one end, and a reaction to numbers that are not finite."""

import re
import signal
import time
from contextlib import suppress
from subprocess import Popen, TimeoutExpired
from typing import Any

import lightning
import torch

from src.data.datamodule import StepWindows
from src.errors import TrainingError
from src.run_directory import RunDirectory
from src.system.private_api import ranks_are_scripts, started_ranks
from src.system.ranks import ParentWatch, describe_failure, describe_lost, report_once
from src.system.signals import StopSignals
from src.training.checkpoints import CheckpointFiles, explain_write_failure
from src.training.lightning_module import LanguageModel, StepOutput

RECORD = "failure.txt"
_LEARN_SECONDS = 3.0
_LOST_CONTACT = re.compile(
    r"gloo/transport"  # the path of a source file; gloo raises a bare RuntimeError, and so does NCCL's watchdog
    r"|remote process exit|communicator was aborted|Watchdog caught collective operation timeout"
)


class RunCallback(lightning.Callback):
    """Tells all ranks which run directory rank 0 claimed; list it first, since other callbacks read `directory`."""

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self.directory = trainer.strategy.broadcast(self.directory)


class RankFailureCallback(lightning.Callback):
    """If a rank fails or is told to stop, ends the others and prints the cause exactly once.

    This is for ranks that run as separate scripts; an error of a forked rank reaches the process that forked it. List
    it second, so that it reports before anything is torn down that other ranks wait for.
    """

    def __init__(self, run: RunCallback, signals: StopSignals) -> None:
        """Record the cause in `run`; `signals` are taken back from Lightning when training starts."""
        self.run, self.signals = run, signals
        self.reported = False
        """Whether this rank or another one has printed the cause, so that it must not be printed again."""
        self._watch: ParentWatch | None = None

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Remove an old record, and watch the parent process if it started this rank."""
        record = self.run.directory.path / RECORD
        if trainer.is_global_zero:
            record.unlink(missing_ok=True)
        trainer.strategy.barrier("failure record")
        if ranks_are_scripts(trainer) and not started_ranks(trainer):
            self._watch = ParentWatch(record)
            self._watch.start()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Replace Lightning's handler of SIGTERM, which starts a collective operation inside the handler."""
        self.signals.listen()

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Stop watching: from here on ranks end one by one."""
        self._stop_watching()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Report the cause unless another rank did, and end the ranks that this process started."""
        children = started_ranks(trainer)
        if self.signals.received:  # an error may be the consequence of how others ended
            self._stop_watching()
            _wait(children)
        if self.signals.received or isinstance(exception, KeyboardInterrupt) or not ranks_are_scripts(trainer):
            return
        report_once(self.run.directory.path / RECORD, self._reason(exception, trainer.global_rank, children))
        self.reported = True
        for child in children:
            child.send_signal(signal.SIGKILL)

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.stop()

    def _reason(self, exception: BaseException, rank: int, children: list[Popen[bytes]]) -> str:
        """Describe the failure; a rank that lost another one first waits a moment to learn how that one ended."""
        failure = describe_failure(explain_write_failure(exception, self.run.directory.path) or exception, rank)
        if not is_lost_contact(exception):
            return failure
        until = time.monotonic() + _LEARN_SECONDS
        while time.monotonic() < until and not (self.run.directory.path / RECORD).exists():
            if self._watch is not None and self._watch.lost():
                return self._watch.reason()
            if (lost := describe_lost(children)) is not None:
                return lost
            time.sleep(0.05)
        return f"{failure}\nrank {rank} lost contact with another rank, which ended without reporting why"


def is_lost_contact(exception: BaseException) -> bool:
    """Whether a collective operation failed, most likely because another rank is gone."""
    return isinstance(exception, torch.distributed.DistError) or (
        isinstance(exception, RuntimeError) and _LOST_CONTACT.search(str(exception)) is not None
    )


def _wait(children: list[Popen[bytes]]) -> None:
    """Wait a moment for ranks that were told to stop, as one that outlives its parent would report it as lost."""
    until = time.monotonic() + _LEARN_SECONDS
    for child in children:
        with suppress(TimeoutExpired):
            child.wait(max(0.0, until - time.monotonic()))


class NonFiniteCallback(lightning.Callback):
    """Reacts to steps that `LanguageModel` left out; list it before callbacks that write checkpoints."""

    def __init__(self, run: RunCallback, *, skip: bool) -> None:
        """Raise TrainingError at the first such step, or with `skip` count them as `train/skipped_steps`."""
        self.run, self.skip = run, skip
        self.skipped_steps = 0

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, LanguageModel)
        output: StepOutput = outputs
        if not output["finite"]:
            if not self.skip:
                raise TrainingError(self._message(trainer, output))
            self.skipped_steps += 1
        if self.skip:
            pl_module.log("train/skipped_steps", float(self.skipped_steps))

    def state_dict(self) -> dict[str, Any]:
        return {"skipped_steps": self.skipped_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped_steps = state_dict["skipped_steps"]

    def _message(self, trainer: lightning.Trainer, output: StepOutput) -> str:
        found = [_describe_rank(trainer, output)]
        if trainer.world_size > 1:
            own, found = found[0], [(False, "")] * trainer.world_size
            torch.distributed.all_gather_object(found, own)
        guilty = [text for is_guilty, text in found if is_guilty] or [text for _, text in found]
        newest = CheckpointFiles(self.run.directory.checkpoints_path).newest()
        good = f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"
        return (
            f"step {trainer.global_step}: not finite; gradient norm {float(output['gradient_norm'])}; "
            f"{'; '.join(guilty)}; {good}; --resume the run with trainer.non_finite=skip to leave such steps out, or "
            "start a new run with a lower optimizer.learning_rate"
        )


def _describe_rank(trainer: lightning.Trainer, output: StepOutput) -> tuple[bool, str]:
    """Return whether a loss of this rank is not finite, and a text with its losses and the numbers of their windows."""
    dataset: Any = getattr(trainer.train_dataloader, "dataset", None)
    bad = ~output["losses"].isfinite().cpu()
    losses = ", ".join(f"{loss:g}" for loss in output["losses"].tolist())
    text = f"rank {trainer.global_rank}: losses of its micro-batches {losses}"
    if isinstance(dataset, StepWindows):
        samples = dataset.samples(trainer.global_step - 1)  # (A, B)
        chosen = samples[bad.numpy()] if bad.any() else samples
        text += f", sample numbers {chosen.flatten().tolist()}"
    return bool(bad.any()), text
