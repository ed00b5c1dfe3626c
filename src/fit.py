"""One fit: corpus, model, Lightning's Trainer with its callbacks, and the directory of the run.

Imports Lightning, which takes seconds; `src.train` imports this module only to train.
"""

import multiprocessing
import platform
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, Strategy, StrategyRegistry
from torch.multiprocessing.spawn import ProcessExitedException

from callbacks import (
    AveragedWeights,
    BestWeightsCallback,
    CheckpointCallback,
    DashboardCallback,
    EvaluationCallback,
    NonFiniteCallback,
    RandomStateCallback,
    RankFailureCallback,
    ReparameterizeCallback,
    RunCallback,
    StepProgressBar,
    ThroughputCallback,
    TimeLimit,
)
from src.config import RunConfig
from src.data.datamodule import PackedDataModule
from src.data.files import expand_files
from src.data.packed_corpus import PackedCorpus, prepare_corpus
from src.data.tokenizer import fingerprint
from src.errors import TrainingError
from src.evaluation.held_out import HeldOut, held_out
from src.evaluation.report import Report
from src.evaluation.suite import Suite, prepare_suite
from src.run_directory import PlugIn, RunDirectory
from src.system.console import print_note, progress_report, stderr_console
from src.system.files import naming, require_writable, write_text
from src.system.hardware import processor_name, require_devices, resolved_accelerator
from src.system.private_api import forks_ranks, keep_graphs_whole, run_hooks_without_steps, started_ranks
from src.system.ranks import ReportedFailureError, is_rank_zero
from src.system.signals import STOP_SIGNALS, Preempted, StopSignals
from src.training.checkpoints import explaining_write_failures
from src.training.lightning_module import LanguageModel
from src.training.resume import Resumption, plugs_into, require_start, start_from_run, starting_rule
from src.training.strategy import ShardedStrategy, StreamingCheckpointIO, cluster_environment
from src.training.tracking import build_loggers, close_loggers, code_version, package_version, wandb_mode


def fit(
    config: RunConfig, start: Resumption | None, signals: StopSignals, more: Sequence[lightning.Callback] = ()
) -> tuple[Path, Report | None]:
    """Train and write everything, from the beginning or from `start`; return the run's path and what was measured.

    `more` callbacks run before those that act on steps and results. Raises as `src.train.train` does.
    """
    wandb_mode(config.wandb)  # names a mistake in the environment before any work
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    if is_rank_zero():
        require_writable(*("output_dir", Path(config.output_dir)) if start is None else ("--resume", start.run.path))
    _require_inputs(config, start)
    with naming("data.cache_dir", Path(config.data.cache_dir)), progress_report(stderr_console()) as progress:
        rule = starting_rule(config.init_from, config.data.tokenizer, None if start is None else start.run)
        corpus = prepare_corpus(config.data, rule, vocab_size=config.model.vocab_size, report=progress)
    if start is not None:
        start.require_corpus(corpus.fingerprint)
    text = held_out(corpus, config.data, config.model.vocab_size, config.evaluation.corpora)
    suite = prepare_suite(text, config.evaluation)
    for note in suite.notes:
        print_note(note)
    plug_in = _plug_in(config, start)
    module = build_module(config, text, signals, is_plug_in=plug_in is not None)
    if config.init_from is not None and (start is None or plug_in is not None):  # no checkpoint holds a base
        start_from_run(module.model, RunDirectory(Path(config.init_from)), corpus.tokenizer)
    if (has_row := module.model.has_row) is not None:  # known before the first step, and the same on every rank
        has_row.logical_or_(corpus.token_counts(config.model.vocab_size).to(has_row.device) > 0)
    run = RunCallback(create_run(config, corpus) if start is None else start.run)
    with explaining_write_failures(run.directory.path):
        if is_rank_zero():
            _describe_run(run.directory, config, text, plug_in)
        loggers = build_loggers(config.wandb, config.to_dict(), run.directory, 0 if start is None else start.step)
    failure = RankFailureCallback(run, signals)
    left = config if start is None or start.missing is None else _only_missing(config, start.missing)
    results = result_callbacks(left, run, corpus, suite, signals)
    callbacks = [run, failure, *more, *progress_callbacks(left, run), *results]
    failed = True
    try:
        with explaining_write_failures(run.directory.path):
            trainer = build_trainer(config, callbacks, loggers)
            _pass_on(signals, trainer)
            data = PackedDataModule(corpus, config.data, text.windows, config.model.rows_once_per)
            trainer.fit(module, data, ckpt_path=None if start is None else start.checkpoint)
        failed = False
    except Preempted:
        failed = False
        raise
    except BaseException as error:
        signum = signals.received or _signal_of_fork(error)
        if signum and not isinstance(error, TrainingError):  # a consequence of how other ranks ended
            failed = False
            raise Preempted(signum) from error
        signals.restore()  # nothing that follows needs to be protected from them
        if failure.reported:
            raise ReportedFailureError from error
        raise
    finally:
        close_loggers(loggers, failed=failed)
    report = next(item.report for item in callbacks if isinstance(item, EvaluationCallback))
    return run.directory.path, report


def _describe_run(run: RunDirectory, config: RunConfig, text: HeldOut, plug_in: PlugIn | None) -> None:
    run.write_config(config.to_dict(), text.rule.record(), plug_in)
    run.update_record(environment())
    text.write(run)


def _pass_on(signals: StopSignals, trainer: lightning.Trainer) -> None:
    """Let a stop signal of this process reach the ranks that it starts."""
    if forks_ranks(trainer):
        signals.delegate(multiprocessing.active_children)
    else:
        signals.children = partial(started_ranks, trainer)


def _signal_of_fork(error: BaseException) -> int:
    """Return the stop signal that ended a forked rank; 0 for any other error."""
    signum = error.exit_code - 128 if isinstance(error, ProcessExitedException) else 0
    return signum if signum in STOP_SIGNALS else 0


def _plug_in(config: RunConfig, start: Resumption | None) -> PlugIn | None:
    if start is not None:
        return start.run.plug_in()
    return None if config.init_from is None else plugs_into(RunDirectory(Path(config.init_from)), config.optimizer)


def _require_inputs(config: RunConfig, start: Resumption | None) -> None:
    """Name what is missing of all that is used only after the corpus was prepared."""
    require_devices(config.trainer.accelerator, config.trainer.devices)
    if start is not None:
        start.run.base()
    if config.init_from is not None and start is None:
        require_start(RunDirectory(Path(config.init_from)), config.model)
    for corpus in config.evaluation.corpora:
        expand_files(corpus.files, "evaluation.corpora")


def build_module(config: RunConfig, text: HeldOut, signals: StopSignals, *, is_plug_in: bool = False) -> LanguageModel:
    """Create the model with its objective and optimizer."""
    module = LanguageModel(
        config.model,
        config.objective,
        config.optimizer,
        text.byte_lengths,
        document_separator=text.document_separator,
        without_weights=config.trainer.strategy == "fsdp2" and not is_rank_zero(),
        is_plug_in=is_plug_in,
    )
    module.signals = signals
    if config.trainer.compile:
        keep_graphs_whole()
        module.model.compile_layers()
    return module


def build_trainer(
    run_config: RunConfig, callbacks: list[lightning.Callback], loggers: list[Logger]
) -> lightning.Trainer:
    """Translate the config into Lightning's Trainer."""
    config = run_config.trainer
    # Gradients are views of DDP's buckets, not copies, also where Lightning chooses DDP by itself.
    StrategyRegistry.register("ddp", DDPStrategy, override=True, start_method="popen", gradient_as_bucket_view=True)
    trainer = lightning.Trainer(
        accelerator=resolved_accelerator(config.accelerator) if config.accelerator == "auto" else config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=_strategy(run_config),
        precision=config.resolved_precision,
        max_steps=config.max_steps,
        max_epochs=-1,
        val_check_interval=config.val_check_interval,
        check_val_every_n_epoch=None,
        limit_val_batches=config.limit_val_batches,
        num_sanity_val_steps=config.num_sanity_val_steps,
        log_every_n_steps=config.log_every_n_steps,
        deterministic=config.deterministic,
        fast_dev_run=config.fast_dev_run,
        enable_progress_bar=config.enable_progress_bar,
        enable_model_summary=False,
        enable_checkpointing=not config.fast_dev_run,
        use_distributed_sampler=False,  # `StepWindows` already gives each rank its own
        callbacks=callbacks,
        plugins=[StreamingCheckpointIO(), cluster_environment(config)],
        logger=loggers,
    )
    run_hooks_without_steps(trainer)
    return trainer


def _strategy(config: RunConfig) -> str | Strategy:
    if config.trainer.strategy == "fsdp2":
        size = config.trainer.shard_group_size
        return ShardedStrategy(shard_devices=size, sharded_checkpoints=config.checkpoint.sharded)
    return config.trainer.strategy


def progress_callbacks(config: RunConfig, run: RunCallback) -> list[lightning.Callback]:
    """Return the callbacks that watch a fit and act on its steps."""
    callbacks: list[lightning.Callback] = [
        RandomStateCallback(),
        ThroughputCallback(),
        LearningRateMonitor(logging_interval="step"),
        NonFiniteCallback(run, skip=config.trainer.non_finite == "skip"),
    ]
    if config.checkpoint.ema_decay is not None:
        callbacks.append(AveragedWeights(config.checkpoint.ema_decay))
    if config.trainer.enable_progress_bar:
        callbacks.append(StepProgressBar(refresh_rate=5))
    if config.trainer.max_time is not None:
        callbacks.append(TimeLimit(config.trainer.max_time))
    return callbacks


def result_callbacks(
    config: RunConfig, run: RunCallback, corpus: PackedCorpus, suite: Suite, signals: StopSignals
) -> list[lightning.Callback]:
    """Return the callbacks that write checkpoints, then weights and table, then the evaluation that reads those."""
    callbacks: list[lightning.Callback] = []
    if not config.trainer.fast_dev_run:
        callbacks.append(checkpoints := CheckpointCallback(run, config.checkpoint, signals))  # acts after all others
        if config.checkpoint.final_weights == "best":
            callbacks.append(BestWeightsCallback(checkpoints))
    if config.lut.at_fit_end:
        callbacks.append(
            ReparameterizeCallback(
                run,
                dtype=config.lut.dtype,
                chunk_tokens=config.lut.chunk_tokens,
                tokenizer=fingerprint(corpus.tokenizer),
                token_counts=corpus.token_counts(config.model.vocab_size),
            )
        )
    if config.evaluation.dashboard:
        callbacks.append(DashboardCallback(run, config.evaluation, suite.text))
    callbacks.append(
        EvaluationCallback(
            run,
            config.evaluation,
            suite=suite,
            tokens_per_step=config.data.global_batch_size * config.data.sequence_length,
            console=stderr_console(),
            is_written=config.lut.at_fit_end,
            publish_table=config.wandb.log_table,
        )
    )
    return callbacks


def create_run(config: RunConfig, corpus: PackedCorpus) -> RunDirectory:
    """Claim a new run directory, numbered if the name is taken, and write tokenizer and record; on rank 0 only."""
    root = Path(config.output_dir)
    if not is_rank_zero():
        return RunDirectory(root / config.name)  # `RunCallback` learns the claimed one from rank 0
    root.mkdir(parents=True, exist_ok=True)
    number, path = 1, root / config.name
    while True:
        try:
            path.mkdir()
            break
        except FileExistsError:
            number += 1
            path = root / f"{config.name}-{number}"
    run = RunDirectory(path)
    write_text(run.tokenizer_path, corpus.tokenizer.to_str(pretty=True))
    run.update_record({"corpus": corpus.facts(), "code": code_version()})
    return run


def environment() -> dict[str, object]:
    """Return what the numbers of a run may depend on, besides its config, corpus and code."""
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = {"processor": processor_name(), "accelerator": accelerator, "threads": torch.get_num_threads()}
    return {"software": software_versions(), "machine": machine}


def software_versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that compute."""
    packages = ("mole", "torch", "lightning", "tokenizers")
    return {"python": platform.python_version(), **{name: package_version(name) for name in packages}}


def _only_missing(config: RunConfig, missing: Sequence[str]) -> RunConfig:
    return replace(config, evaluation=replace(config.evaluation, at_fit_end="evaluation" in missing))
