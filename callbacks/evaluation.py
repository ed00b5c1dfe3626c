"""Scores the model before, during and after a fit, in its training form and from disk, and writes the report."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import lightning
import torch
from rich.console import Console

from callbacks.failures import RunCallback
from src.errors import UserError
from src.evaluation.config import EvaluationConfig
from src.evaluation.perplexity import Score, Share, zlib_bits_per_byte
from src.evaluation.report import Report, TableFacts, print_report, sample_text
from src.evaluation.results import Evaluation, write_scores
from src.evaluation.suite import Suite, evaluate_model, evaluating
from src.inference import load_model
from src.inference.disk_experts import DiskExperts
from src.inference.loader import ExpertForm, InferenceModel, written_form
from src.model import Transformer
from src.system.console import progress_bar
from src.system.files import when_visible
from src.training.lightning_module import LanguageModel
from src.training.tracking import logged_step, publish_results


class EvaluationCallback(lightning.Callback):
    """Held-out loss before the first step; all texts and tasks on schedule and, at the end, of both forms.

    Every rank computes its share and gets all results; rank 0 reports. List it after `ReparameterizeCallback`, whose
    files it reads.
    """

    def __init__(
        self,
        run: RunCallback,
        config: EvaluationConfig,
        *,
        suite: Suite,
        tokens_per_step: int,
        console: Console,
        is_written: bool,
        publish_table: bool = False,
    ) -> None:
        """Score what `suite` holds, as `config` says, and report to `run`, trackers and `console`.

        Args:
            run: where the report goes.
            config: says what is scored when.
            suite: the texts and tasks.
            tokens_per_step: for the number of trained tokens.
            console: where the report is printed.
            is_written: whether this fit writes weights and table, so that the files in the run are those of this model.
            publish_table: also send the lookup table to trackers that keep files.
        """
        self.run, self.config, self.suite, self.is_written = run, config, suite, is_written
        self.tokens_per_step, self.console, self.publish_table = tokens_per_step, console, publish_table
        self.initial: Score | None = None
        self.report: Report | None = None

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Evaluate what rank 0 finds missing: ranks that see other files would not meet again."""
        self.config = trainer.strategy.broadcast(self.config)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Score the model as it is before its first step; a resumed run has been scored already."""
        assert isinstance(pl_module, LanguageModel)
        if trainer.global_step == 0 and self.config.at_fit_end:
            self.initial = self._initial_score(trainer, pl_module.model)

    def on_validation_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Score the training form, as validation sees it (with averaged weights, where there are any), when due."""
        assert isinstance(pl_module, LanguageModel)
        if self._is_due(trainer):
            metrics = self._evaluate(trainer, pl_module.model).metrics()
            self._log(trainer, {f"eval/{name}": value for name, value in metrics.items()})

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Score both forms, write the report, print it."""
        assert isinstance(pl_module, LanguageModel)
        if not self.config.at_fit_end:
            return
        training_form = self._evaluate(trainer, pl_module.model)
        self.report = self._final_report(trainer, pl_module.model, training_form)
        if trainer.is_global_zero:
            run = self.run.directory
            self._log(trainer, self.report.metrics())
            write_scores(run.scores_path, self.report.evaluations())
            run.update_record(self.report.to_dict())
            publish_results(trainer.loggers, run, with_table=self.publish_table)
            print_report(self.report, self.console, run.path)
        trainer.strategy.barrier("evaluated")

    def state_dict(self) -> dict[str, Any]:
        """Return the first score, which a resumed run cannot measure again."""
        return {"initial": None if self.initial is None else asdict(self.initial)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        initial = state_dict["initial"]
        self.initial = None if initial is None else Score(**initial)

    def _is_due(self, trainer: lightning.Trainer) -> bool:
        every, interval = self.config.every_validations, trainer.val_check_batch
        if every is None or trainer.sanity_checking or not isinstance(interval, int):
            return False
        return trainer.global_step % (every * interval) == 0

    def _initial_score(self, trainer: lightning.Trainer, model: Transformer) -> Score:
        text, size = self.suite.text, self.config.batch_size
        with evaluating(model), progress_bar("scoring the untrained model (windows)", len(text.windows)) as advance:
            return text.score(model, batch_size=size, share=_share(trainer), progress=advance)

    def _evaluate(self, trainer: lightning.Trainer, model: Transformer) -> Evaluation:
        with evaluating(model):
            return evaluate_model(
                model, self.suite, batch_size=self.config.batch_size, share=_share(trainer), progress=progress_bar
            )

    def _final_report(self, trainer: lightning.Trainer, model: Transformer, training_form: Evaluation) -> Report:
        with self._written(trainer, model) as written:
            lookup = isinstance(written.experts, DiskExperts)
            return Report(
                steps=trainer.global_step,
                trained_tokens=trainer.global_step * self.tokens_per_step,
                initial=self.initial,
                training_evaluation=training_form,
                lookup_evaluation=self._evaluate(trainer, written) if lookup else None,
                zlib_bits_per_byte=zlib_bits_per_byte(self.suite.text.text),
                table=_table_facts(written),
                training_form_bytes=_weight_bytes(model),
                lookup_form_bytes=_weight_bytes(written) if lookup else None,
                sample=sample_text(written, self.suite.text.rule, self.config),
            )

    @contextmanager
    def _written(self, trainer: lightning.Trainer, model: Transformer) -> Generator[Transformer]:
        """Yield the model as this fit wrote it; the one in memory if it writes none. Rank 0 decides in which form."""
        if self.is_written:
            with self._loaded(trainer, model.embedding.weight) as written:
                yield written
        else:
            with evaluating(model):
                yield model

    def _loaded(self, trainer: lightning.Trainer, like: torch.Tensor) -> InferenceModel:
        """Load the run's weights in the precision of training, which a base may not have."""
        run = self.run.directory
        form: ExpertForm = trainer.strategy.broadcast(written_form(run) if trainer.is_global_zero else "auto")
        load = partial(load_model, run.path, experts=form, device=like.device, dtype=like.dtype)
        return load() if trainer.is_global_zero else when_visible(load, UserError)

    def _log(self, trainer: lightning.Trainer, metrics: dict[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=logged_step(trainer))


def _share(trainer: lightning.Trainer) -> Share:
    return Share(trainer.global_rank, trainer.world_size)


def _weight_bytes(model: Transformer) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _table_facts(model: Transformer) -> TableFacts | None:
    if not isinstance(model.experts, DiskExperts):
        return None
    store = model.experts.store
    return TableFacts(
        directory=store.lut_dir.name,
        precision=store.layout.precision,
        table_bytes=store.layout.table_bytes,
        bytes_per_token=store.layout.row_bytes,
    )
