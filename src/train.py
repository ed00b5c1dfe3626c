"""`python -m src.train`: train, write weights and table, evaluate both forms.

Lightning's Trainer for a run: arguments and callbacks, in the order in which they act.
"""

import importlib.metadata
import json
import logging
import platform
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
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
    StepProgressBar,
    ThroughputCallback,
    TimeLimit,
)
from src.accounting import account, print_account
from src.cli import parser, run_verb
from src.config import RunConfig, describe, load_config, load_run_config
from src.data.datamodule import PackedDataModule
from src.data.packed_corpus import PackedCorpus, prepare_corpus
from src.data.tokenizer import fingerprint, separator_id
from src.evaluation.held_out import held_out
from src.evaluation.report import Report
from src.evaluation.suite import prepare_suite
from src.run_directory import RunDirectory
from src.system.console import progress_report, stderr_console
from src.system.files import write_text
from src.system.hardware import keep_freed_memory, native_precision
from src.system.ranks import FAILED, ReportedFailureError, is_rank_zero, leave
from src.system.signals import Preempted
from src.training.checkpoints import StreamingCheckpointIO
from src.training.config import TrainerConfig
from src.training.lightning_module import LanguageModel
from src.training.resume import Resumption, compare_configs, start_from_run
from src.training.strategy import ShardedStrategy
from src.training.tracking import build_loggers, close_loggers, code_version


def build_trainer(
    run_config: RunConfig, callbacks: list[lightning.Callback], loggers: list[Logger]
) -> lightning.Trainer:
    """Translate the config into Lightning's Trainer."""
    config = run_config.trainer
    # Gradients live in DDP's buckets, not beside them, also where Lightning chooses DDP by itself.
    StrategyRegistry.register("ddp", DDPStrategy, override=True, start_method="popen", gradient_as_bucket_view=True)
    return lightning.Trainer(
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


def progress_callbacks(config: RunConfig, run: RunDirectory) -> list[lightning.Callback]:
    """Return what watches a fit and acts on its steps."""
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
    config: RunConfig, run: RunDirectory, corpus: PackedCorpus, evaluation: EvaluationCallback
) -> list[lightning.Callback]:
    """Return what a fit leaves behind: checkpoints, weights and table, then the evaluation that reads them."""
    callbacks: list[lightning.Callback] = []
    if not config.trainer.fast_dev_run:
        callbacks.append(checkpoints := CheckpointCallback(run, config.checkpoint))  # acts after all others
        if config.checkpoint.final_weights == "best":
            callbacks.append(BestWeightsCallback(checkpoints))
    if config.lut.at_fit_end:
        callbacks.append(
            ReparameterizeCallback(
                run.path,
                dtype=config.lut.dtype,
                chunk_tokens=config.lut.chunk_tokens,
                tokenizer=fingerprint(corpus.tokenizer),
                token_counts=corpus.token_counts(config.model.vocab_size),
            )
        )
    if config.evaluation.dashboard:
        callbacks.append(DashboardCallback(run.path, config.evaluation, evaluation.suite.text))
    callbacks.append(evaluation)
    return callbacks


DEFAULT_CONFIG = "configs/quickstart.yaml"


@dataclass(frozen=True)
class RunResult:
    """What a training run left behind."""

    run_dir: Path
    report: Report | None
    """None when `evaluation.at_fit_end` is off."""


def train(config: RunConfig, resume: RunDirectory | None = None) -> RunResult:
    """Train as `config` says, and return where the results lie and what they are.

    Args:
        config: decides the run.
        resume: go on with this run, from its newest checkpoint; `config` is then what `resumed_config` returned.

    Raises:
        UserError: the config, corpus or tokenizer cannot be used, or training cannot go on.
        Preempted: the process was told to stop; a checkpoint has all that was done.
        ReportedFailureError: a rank failed, and said why.
    """
    console = stderr_console()
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    with progress_report(console) as progress:
        corpus = prepare_corpus(config.data, vocab_size=config.model.vocab_size, report=progress)
    text = held_out(corpus, config.data, config.model.vocab_size, config.evaluation.corpora)
    suite = prepare_suite(text, config.evaluation)
    for note in suite.notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    separator = separator_id(corpus.tokenizer) if config.data.document_mask else None
    module = LanguageModel(
        config.model, config.objective, config.optimizer, text.byte_lengths, document_separator=separator
    )
    if config.trainer.compile:
        module.model.compile_layers()
    start = None
    if resume is not None:
        limits = config.trainer
        start = Resumption.plan(resume, max_steps=limits.max_steps, strategy=limits.strategy, corpus=corpus.fingerprint)
    if config.init_from is not None and start is None:
        start_from_run(module.model, RunDirectory(Path(config.init_from)), corpus.tokenizer)
    run = create_run(config, corpus) if start is None else continue_run(config, start.run)
    if is_rank_zero():
        text.write(run)
    evaluation = EvaluationCallback(
        run.path,
        config.evaluation,
        suite=suite,
        tokens_per_step=config.data.global_batch_size * config.data.sequence_length,
        console=console,
        publish_table=config.wandb.log_table,
    )
    failure = RankFailureCallback(run)
    callbacks = [failure, *progress_callbacks(config, run), *result_callbacks(config, run, corpus, evaluation)]
    loggers, failed = build_loggers(config.wandb, config.to_dict(), run, 0 if start is None else start.step), True
    try:
        trainer = build_trainer(config, callbacks, loggers)
        checkpoint = None if start is None else start.checkpoint
        trainer.fit(module, PackedDataModule(corpus, config.data, text.windows), ckpt_path=checkpoint)
        failed = False
    except Exception as error:
        if failure.reported:
            raise ReportedFailureError from error
        raise
    finally:
        close_loggers(loggers, failed=failed)
    return RunResult(run.path, evaluation.report)


def resumed_config(run: RunDirectory, path: str | None, overrides: Sequence[str]) -> RunConfig:
    """Return the config that `run` goes on with, and print in what it differs.

    `path` is a config to go on with instead of the run's own. ConfigError names keys that cannot change.
    """
    before = load_run_config(run.require())
    now = load_run_config(run, overrides) if path is None else load_config(path, overrides)
    differences = compare_configs(run, before.to_dict(), now.to_dict())
    for difference in differences:
        stderr_console().print(f"{run.path} goes on with {difference}", markup=False, highlight=False, soft_wrap=True)
    return now


def continue_run(config: RunConfig, run: RunDirectory) -> RunDirectory:
    """Record the config that a run goes on with; on rank 0 only."""
    if is_rank_zero():
        run.write_config(config.to_dict())
    return run


def create_run(config: RunConfig, corpus: PackedCorpus) -> RunDirectory:
    """Claim a new run directory, numbered if the name is taken, and write config and tokenizer; on rank 0 only."""
    root = Path(config.output_dir)
    if not is_rank_zero():
        return RunDirectory(root / config.name)  # callbacks learn the claimed one from rank 0
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
    options.add_argument("--resume", type=Path, metavar="RUN", help="go on with this run from its newest checkpoint")
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
    """Leave out what Lightning says of itself, but not that it ends ranks because one of them was lost."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # of rows, which are only read


def _train_as_process(config: RunConfig, resume: RunDirectory | None) -> None:
    """Train, and end this process as its rank should.

    Ranks above 0 end well when the run is preempted: a launcher would kill rank 0 before it is done otherwise.
    """
    try:
        train(config, resume)
    except Preempted as stop:
        stderr_console().print(str(stop), markup=False, highlight=False)
        sys.exit(stop.exit_code if is_rank_zero() else 0)
    except ReportedFailureError:
        leave(FAILED)


if __name__ == "__main__":
    run_verb(main)
