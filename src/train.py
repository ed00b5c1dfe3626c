"""`python -m src.train`: train, write weights and table, evaluate both forms."""

import importlib.metadata
import json
import logging
import platform
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import lightning
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, Strategy, StrategyRegistry
from rich.console import Console

from callbacks import (
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
from src.accounting import account, print_account
from src.cli import parser, run_verb
from src.config import RunConfig, describe, load_config, load_run_config
from src.data.datamodule import PackedDataModule
from src.data.packed_corpus import PackedCorpus, prepare_corpus
from src.data.tokenizer import fingerprint
from src.evaluation.held_out import HeldOut, held_out
from src.evaluation.report import Report
from src.evaluation.suite import Suite, prepare_suite
from src.run_directory import RunDirectory
from src.system.console import progress_report, stderr_console
from src.system.files import write_text
from src.system.hardware import keep_freed_memory, native_precision
from src.system.private_api import run_hooks_without_steps
from src.system.ranks import FAILED, ReportedFailureError, is_rank_zero, leave
from src.system.signals import Preempted, StopSignals, exit_code, leave_on_stop_signals
from src.training.config import TrainerConfig
from src.training.lightning_module import LanguageModel
from src.training.resume import Resumption, Wanted, compare_configs, start_from_run
from src.training.strategy import ShardedStrategy, StreamingCheckpointIO
from src.training.tracking import build_loggers, close_loggers, code_version


def build_trainer(
    run_config: RunConfig, callbacks: list[lightning.Callback], loggers: list[Logger]
) -> lightning.Trainer:
    """Translate the config into Lightning's Trainer."""
    config = run_config.trainer
    # Gradients are views of DDP's buckets, not copies, also where Lightning chooses DDP by itself.
    StrategyRegistry.register("ddp", DDPStrategy, override=True, start_method="popen", gradient_as_bucket_view=True)
    trainer = lightning.Trainer(
        accelerator=_accelerator(config.accelerator),
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=_strategy(run_config),
        precision=precision(config),
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
        plugins=[StreamingCheckpointIO()],
        logger=loggers,
    )
    run_hooks_without_steps(trainer)
    return trainer


def precision(config: TrainerConfig) -> Literal["32-true", "bf16-mixed", "bf16-true", "64-true"]:
    """Resolve `auto` on this machine."""
    return native_precision(config.accelerator) if config.precision == "auto" else config.precision


def _accelerator(name: str) -> str:
    """Resolve `auto`, which in Lightning also means accelerators that lack the float64 of our metrics."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _strategy(config: RunConfig) -> str | Strategy:
    if config.trainer.strategy == "fsdp2":
        return ShardedStrategy(sharded_checkpoints=config.checkpoint.sharded)
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
        callbacks.append(EMAWeightAveraging(decay=config.checkpoint.ema_decay, use_buffers=False))
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


DEFAULT_CONFIG = "configs/quickstart.yaml"


@dataclass(frozen=True)
class RunResult:
    """What a training run left behind."""

    run_dir: Path
    report: Report | None
    """None when `evaluation.at_fit_end` is off, or the run that was resumed had a report already."""


def train(config: RunConfig, resume: RunDirectory | None = None) -> RunResult:
    """Train as `config` says, and return where the results lie and what they are.

    Args:
        config: decides the run.
        resume: continue this run from its newest checkpoint, or do what is missing after its last step; `config` is
            then what `resumed_config` returned.

    Raises:
        UserError: the config, corpus or tokenizer cannot be used, or training cannot continue.
        Preempted: the process was told to stop. Finished steps are in a checkpoint, finished results in the run.
        ReportedFailureError: a rank failed, and the cause has been printed.
    """
    start = None if resume is None else Resumption.plan(resume, wanted_results(config))
    if start is not None and start.missing is not None:
        lacks = f"is missing {', '.join(start.missing)}" if start.missing else "is complete"
        hint = "to train longer, raise trainer.max_steps (and trainer.max_time, if set)"
        _tell(f"{start.run.path}: all {start.step} steps are done, and the run {lacks}; {hint}")
        if not start.missing:
            return RunResult(start.run.path, None)
    signals = StopSignals()
    signals.listen()
    try:
        return _train(config, start, signals)
    finally:
        signals.restore()


def _train(config: RunConfig, start: Resumption | None, signals: StopSignals) -> RunResult:
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    with progress_report(stderr_console()) as progress:
        corpus = prepare_corpus(config.data, vocab_size=config.model.vocab_size, report=progress)
    if start is not None:
        start.require_corpus(corpus.fingerprint)
    text = held_out(corpus, config.data, config.model.vocab_size, config.evaluation.corpora)
    suite = prepare_suite(text, config.evaluation)
    for note in suite.notes:
        _tell(f"note: {note}")
    module = build_module(config, text, signals)
    if config.init_from is not None and start is None:
        start_from_run(module.model, RunDirectory(Path(config.init_from)), corpus.tokenizer)
    run = RunCallback(create_run(config, corpus) if start is None else continue_run(config, start.run))
    if is_rank_zero():
        text.write(run.directory)
    failure = RankFailureCallback(run, signals)
    left = config if start is None or start.missing is None else _only_missing(config, start.missing)
    callbacks = [
        run,
        failure,
        *progress_callbacks(left, run),
        *result_callbacks(left, run, corpus, suite, signals),
    ]
    loggers = build_loggers(config.wandb, config.to_dict(), run.directory, 0 if start is None else start.step)
    failed = True
    try:
        trainer = build_trainer(config, callbacks, loggers)
        checkpoint = None if start is None else start.checkpoint
        trainer.fit(module, PackedDataModule(corpus, config.data, text.windows), ckpt_path=checkpoint)
        failed = False
    except Preempted:
        failed = False
        raise
    except BaseException as error:
        if signals.received:  # a consequence of how other ranks ended
            failed = False
            raise Preempted(signals.received) from error
        signals.restore()  # nothing that follows needs to be protected from them
        if failure.reported:
            raise ReportedFailureError from error
        raise
    finally:
        close_loggers(loggers, failed=failed)
    report = next(item.report for item in callbacks if isinstance(item, EvaluationCallback))
    return RunResult(run.directory.path, report)


def build_module(config: RunConfig, text: HeldOut, signals: StopSignals) -> LanguageModel:
    """Create the model with its objective and optimizer."""
    module = LanguageModel(
        config.model,
        config.objective,
        config.optimizer,
        text.byte_lengths,
        document_separator=text.document_separator,
    )
    module.signals = signals
    if config.trainer.compile:
        module.model.compile_layers()
    return module


def wanted_results(config: RunConfig) -> Wanted:
    """Return what decides how a run of this config is resumed."""
    return Wanted(
        max_steps=config.trainer.max_steps,
        max_time=config.trainer.max_time,
        strategy=config.trainer.strategy,
        final_weights=config.checkpoint.final_weights,
        table=config.lut.dtype if config.lut.at_fit_end else None,
        evaluation=config.evaluation.at_fit_end,
    )


def _only_missing(config: RunConfig, missing: Sequence[str]) -> RunConfig:
    return replace(config, evaluation=replace(config.evaluation, at_fit_end="evaluation" in missing))


def _tell(text: str) -> None:
    stderr_console().print(text, markup=False, highlight=False, soft_wrap=True)


def resumed_config(run: RunDirectory, path: str | None, overrides: Sequence[str]) -> RunConfig:
    """Return the config to resume `run` with, and print in what it differs from the run's.

    `path` is a config to use instead of the run's own. ConfigError names keys that cannot change.
    """
    before = load_run_config(run.require())
    now = load_run_config(run, overrides) if path is None else load_config(path, overrides)
    for difference in compare_configs(run, before.to_dict(), now.to_dict()):
        _tell(f"{run.path} continues with {difference}")
    return now


def continue_run(config: RunConfig, run: RunDirectory) -> RunDirectory:
    """Record the config that a run continues with; on rank 0 only."""
    if is_rank_zero():
        run.write_config(config.to_dict())
    return run


def create_run(config: RunConfig, corpus: PackedCorpus) -> RunDirectory:
    """Claim a new run directory, numbered if the name is taken, and write config and tokenizer; on rank 0 only."""
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
    run.write_config(config.to_dict())
    write_text(run.tokenizer_path, corpus.tokenizer.to_str(pretty=True))
    run.update_record({"corpus": corpus.facts(), "code": code_version(), "software": software_versions()})
    return run


def software_versions() -> dict[str, str]:
    """Return what the numbers of a run may depend on."""
    packages = ("mole", "torch", "lightning", "tokenizers")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def dry_run(config: RunConfig, unique_ids: int | None = None, json_path: Path | None = None) -> None:
    """Print what a run of `config` costs, and write it to `json_path`; reads no corpus and allocates no model."""
    costs = account(
        config.model,
        sequence_length=config.data.sequence_length,
        micro_batch_size=config.data.micro_batch_size,
        precision=precision(config.trainer),
        micro_batches=config.data.micro_batches_per_step(config.trainer.stated_devices),
        unique_ids=unique_ids,
    )
    print_account(costs, Console())
    if json_path is not None:
        write_text(json_path, json.dumps(costs.to_dict(), indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    options = parser("train", (__doc__ or ""), "python -m src.train trainer.max_steps=100 name=try")
    options.add_argument("--config", help=f"YAML config (default: {DEFAULT_CONFIG}; with --resume the run's own)")
    options.add_argument("--resume", type=Path, metavar="RUN", help="continue this run, or do what it still lacks")
    options.add_argument("--print-config", action="store_true", help="print every key, its value and meaning, and stop")
    options.add_argument(
        "--dry-run", action="store_true", help="print what the run costs, allocating none of it, and stop"
    )
    options.add_argument("--unique-ids", type=int, metavar="N", help="dry run: distinct ids per micro-batch to assume")
    options.add_argument("--json", type=Path, metavar="PATH", help="dry run: also write the figures there")
    options.add_argument("overrides", nargs="*", metavar="key=value", help="override a config key, such as seed=1")
    given = options.parse_args(arguments)
    if not given.dry_run and (given.unique_ids is not None or given.json is not None):
        options.error("--unique-ids and --json belong to --dry-run")
    resume = None if given.resume is None else RunDirectory(given.resume)
    if resume is None:
        config = load_config(given.config or DEFAULT_CONFIG, given.overrides)
    else:
        config = resumed_config(resume, given.config, given.overrides)
    if given.print_config:
        print(describe(config))
        return
    if given.dry_run:
        dry_run(config, given.unique_ids, given.json)
        return
    keep_freed_memory()
    _quieten_lightning()
    _train_as_process(config, resume)


def _quieten_lightning() -> None:
    """Hide Lightning's remarks, except that it ends ranks because one of them was lost."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # of rows, which are only read


def _train_as_process(config: RunConfig, resume: RunDirectory | None) -> None:
    """Train, and end this process as its rank should."""
    try:
        train(config, resume)
    except Preempted as stop:
        _tell(str(stop))
        leave(exit_code(stop.signum))  # everything is closed, and taking down the interpreter takes seconds
    except ReportedFailureError:
        leave(FAILED)


if __name__ == "__main__":
    leave_on_stop_signals()
    run_verb(main)
