"""Scores the model before and after a fit, in its training form and from disk, and reports."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import torch
from rich.console import Console

from src.cli import progress_bar
from src.evaluation.config import EvaluationConfig
from src.evaluation.held_out import HeldOut
from src.evaluation.perplexity import Score, score_windows, zlib_bits_per_byte
from src.evaluation.report import Report, TableFacts, print_report, update_report
from src.inference import InferenceModel, generate, load_model
from src.inference.disk_experts import DiskExperts
from src.lightning_module import LanguageModel
from src.model import Transformer
from src.run_directory import RunDirectory
from src.sharding import is_sharded


class EvaluationCallback(lightning.Callback):
    """Held-out loss before the first step and, at the end, of both forms; rank 0 computes, the others wait.

    List it after `ReparameterizeCallback`, whose files it reads.
    """

    def __init__(
        self,
        run_dir: Path,
        config: EvaluationConfig,
        *,
        text: HeldOut,
        tokens_per_step: int,
        console: Console,
    ) -> None:
        """Score `text` and report to `run_dir` and `console`."""
        self.run, self.config, self.text = RunDirectory(run_dir), config, text
        self.tokens_per_step, self.console = tokens_per_step, console
        self.initial: Score | None = None
        self.report: Report | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Score the model as it is before its first step; a resumed run has been scored already."""
        assert isinstance(pl_module, LanguageModel)
        if trainer.global_step == 0:
            self.initial = self._score_training_form("scoring the untrained model", trainer, pl_module.model)
        trainer.strategy.barrier("initial score")

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Score both forms, write the report, print it."""
        assert isinstance(pl_module, LanguageModel)
        training_form = self._score_training_form("scoring the training form", trainer, pl_module.model)
        if training_form is not None:
            self.report = self._evaluate(trainer, pl_module.model, training_form)
            update_report(self.run.report_path, self.report.to_dict())
            for logger in trainer.loggers:
                logger.log_metrics(self.report.metrics(), step=trainer.global_step)
            print_report(self.report, self.console, self.run.path)
        trainer.strategy.barrier("evaluated")

    def state_dict(self) -> dict[str, Any]:
        """Return the first score, which a resumed run cannot measure again."""
        return {"initial": None if self.initial is None else asdict(self.initial)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the first score over."""
        initial = state_dict["initial"]
        self.initial = None if initial is None else Score(**initial)

    def _evaluate(self, trainer: lightning.Trainer, model: Transformer, training_form: Score) -> Report:
        device = model.embedding.weight.device
        with load_model(self.run.path, device=device) as written:  # what was written, not what is in memory
            lookup = isinstance(written.experts, DiskExperts)
            lookup_form = self._score("scoring the lookup form", written) if lookup else None
            return Report(
                steps=trainer.global_step,
                trained_tokens=trainer.global_step * self.tokens_per_step,
                initial=self.initial,
                training_form=training_form,
                lookup_form=lookup_form,
                zlib_bits_per_byte=zlib_bits_per_byte(self.text.text),
                table=_table_facts(written),
                training_form_bytes=_weight_bytes(model),
                lookup_form_bytes=_weight_bytes(written) if lookup else None,
                sample=self._sample(written),
            )

    def _score_training_form(self, description: str, trainer: lightning.Trainer, model: Transformer) -> Score | None:
        """Score on rank 0 alone, or where ranks hold parts of the model on all of them; None on ranks above 0."""
        score = self._score(description, model) if trainer.is_global_zero or is_sharded(model) else None
        return score if trainer.is_global_zero else None

    def _score(self, description: str, model: Transformer) -> Score:
        windows, lengths = self.text.windows, self.text.byte_lengths
        with _evaluating(model), progress_bar(description + " (windows)", len(windows)) as advance:
            return score_windows(model, windows, lengths, batch_size=self.config.batch_size, progress=advance)

    def _sample(self, model: InferenceModel) -> str | None:
        if not self.config.sample_prompt or not self.config.sample_tokens:
            return None
        device = model.embedding.weight.device
        prompt = torch.tensor([self.text.tokenizer.encode(self.config.sample_prompt).ids], device=device)
        room = model.config.max_sequence_length - prompt.shape[1]
        continued = generate(
            model,
            prompt,
            max_new_tokens=min(self.config.sample_tokens, room),
            temperature=self.config.sample_temperature,
            seed=0,
        )
        return self.text.tokenizer.decode(continued[0].tolist())


@contextmanager
def _evaluating(model: Transformer) -> Generator[None]:
    """Evaluate in full precision, and leave the mode as it was."""
    training = model.training
    model.eval()
    try:
        with torch.autocast(model.embedding.weight.device.type, enabled=False):
            yield
    finally:
        model.train(training)


def _weight_bytes(model: Transformer) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _table_facts(model: InferenceModel) -> TableFacts | None:
    if not isinstance(model.experts, DiskExperts):
        return None
    store = model.experts.store
    return TableFacts(
        directory=store.lut_dir.name,
        precision=store.manifest.precision,
        table_bytes=store.layout.table_bytes,
        bytes_per_token=store.layout.row_bytes,
    )
