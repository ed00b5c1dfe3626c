"""Stops a run, or counts, when a step's loss or gradient was not finite."""

from typing import Any

import lightning
import torch

from src.checkpointing.files import CheckpointFiles
from src.data.datamodule import StepWindows
from src.errors import TrainingError
from src.lightning_module import LanguageModel, StepOutput
from src.run_directory import RunDirectory


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
