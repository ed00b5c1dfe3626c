"""`python -m src.train`: train, write weights and table, evaluate both forms."""

import importlib
import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from src.accounting import account, print_account
from src.cli import find_config, find_run, number, output_file, parser, run_verb
from src.config import RunConfig, describe, load_config, load_run_config
from src.errors import RunError, caused_by
from src.evaluation.report import Report
from src.run_directory import RunDirectory, absolute_paths
from src.system.console import print_note, stderr_console
from src.system.files import write_text
from src.system.hardware import keep_freed_memory, require_posix, resolved_accelerator
from src.system.ranks import FAILED, ReportedFailureError, is_rank_zero, leave
from src.system.signals import Preempted, StopSignals, exit_code, leave_on_stop_signals
from src.training.config import require_ranks
from src.training.resume import Resumption, Wanted, compare_configs

if TYPE_CHECKING:  # it takes seconds to import; `--help` does without
    from lightning import Callback

DEFAULT_CONFIG = "configs/quickstart.yaml"


@dataclass(frozen=True)
class RunResult:
    """What a training run left behind."""

    run_dir: Path
    report: Report | None
    """None when `evaluation.at_fit_end` is off, or the run that was resumed had a report already."""


def train(config: RunConfig, resume: RunDirectory | None = None, callbacks: Sequence["Callback"] = ()) -> RunResult:
    """Train as `config` says, and return the run directory and the report.

    Args:
        config: decides the run.
        resume: continue this run from its newest checkpoint, or do what is missing after its last step; `config` is
            then what `resumed_config` returned.
        callbacks: run before the project's own that act on steps and results.

    Raises:
        UserError: the config, corpus or tokenizer cannot be used, or training cannot continue.
        Preempted: the process was told to stop. Finished steps are in a checkpoint, finished results in the run.
        ReportedFailureError: a rank failed, and the cause has been printed.
    """
    require_posix("training")
    require_ranks(config.trainer)
    _ = config.trainer.shard_group_size  # refused before any work
    start = None if resume is None else _resumption(resume, config)
    if start is not None and start.missing is not None:
        lacks = f"is missing {', '.join(start.missing)}" if start.missing else "is complete"
        hint = "to train longer, raise trainer.max_steps (and trainer.max_time, if set)"
        _tell(f"{start.run.path}: all {start.step} steps are done, and the run {lacks}; {hint}")
        if not start.missing:
            return RunResult(start.run.path, None)
    _check_batch(config)
    from src.fit import fit  # with Lightning

    signals = StopSignals()
    signals.listen()
    try:
        return RunResult(*fit(config, start, signals, callbacks))
    finally:
        signals.restore()


def _check_batch(config: RunConfig) -> None:
    """Refuse devices that cannot share the global batch; say where they take less at a time than they may."""
    data, world_size = config.data, config.trainer.world_size
    windows, share = data.micro_batch_windows(world_size), data.global_batch_size // world_size
    if windows < min(data.micro_batch_size, share) and is_rank_zero():
        print_note(
            f"data.micro_batch_size: {data.micro_batch_size} does not divide the {share} windows that each device "
            f"takes in a step, so it takes {windows} at a time"
        )


def _resumption(run: RunDirectory, config: RunConfig) -> Resumption:
    try:
        return Resumption.plan(run, wanted_results(config))
    except RunError:
        if is_rank_zero():
            raise
        return Resumption.of_rank_zero(run)  # which sees more, or fails and ends this rank too


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


def _tell(text: str) -> None:
    stderr_console().print(text, markup=False, highlight=False, soft_wrap=True)


def resumed_config(run: RunDirectory, path: Path | None, overrides: Sequence[str]) -> RunConfig:
    """Return the config to resume `run` with, and print in what it differs from the run's.

    `path` is a config to use instead of the run's own. ConfigError names keys that cannot change.
    """
    before = load_run_config(find_run(run.path, "--resume"))
    now = load_run_config(run, overrides) if path is None else load_config(path, overrides)
    for difference in compare_configs(run, absolute_paths(before.to_dict()), absolute_paths(now.to_dict())):
        _tell(f"{run.path} continues with {difference}")
    return now


def dry_run(config: RunConfig, unique_ids: int | None = None, json_path: Path | None = None) -> None:
    """Print what a run of `config` costs, and write it to `json_path`; reads no corpus and allocates no model."""
    costs = account(
        config.model,
        sequence_length=config.data.sequence_length,
        micro_batch_size=config.data.micro_batch_windows(config.trainer.world_size),
        precision=config.trainer.resolved_precision,
        micro_batches=config.data.micro_batches_per_step(config.trainer.world_size),
        unique_ids=unique_ids,
        shard_group_size=config.trainer.shard_group_size if config.trainer.strategy == "fsdp2" else None,
        trains_backbone=config.optimizer.trains_backbone,
    )
    print_account(costs, Console())
    if json_path is not None:
        write_text(json_path, json.dumps(costs.to_dict(), indent=1) + "\n")


def main(arguments: Sequence[str] | None = None, callbacks: Sequence["Callback"] = ()) -> None:
    """Parse the command line and train, with `callbacks` of a caller."""
    options = parser("train", (__doc__ or ""), "python -m src.train trainer.max_steps=100 name=try")
    options.add_argument(
        "--config", type=Path, help=f"YAML config (default: {DEFAULT_CONFIG}; with --resume the run's own)"
    )
    options.add_argument("--resume", type=Path, metavar="RUN", help="continue this run, or finish what is missing")
    options.add_argument("--print-config", action="store_true", help="print every key, its value and meaning, and stop")
    options.add_argument(
        "--dry-run", action="store_true", help="print what the run would cost, without allocating it, and stop"
    )
    options.add_argument(
        "--unique-ids", type=number(int, 1), metavar="N", help="dry run: distinct ids per micro-batch to assume"
    )
    options.add_argument("--json", type=output_file, metavar="PATH", help="dry run: also write the figures there")
    options.add_argument("overrides", nargs="*", metavar="key=value", help="override a config key, such as seed=1")
    given = options.parse_args(arguments)
    if not given.dry_run and (given.unique_ids is not None or given.json is not None):
        options.error("--unique-ids and --json belong to --dry-run")
    path = None if given.config is None else find_config(given.config)
    resume = None if given.resume is None else RunDirectory(given.resume)
    if resume is None:
        config = load_config(path or DEFAULT_CONFIG, given.overrides)
    else:
        config = resumed_config(resume, path, given.overrides)
    if given.print_config:
        print(describe(config))
        return
    if given.dry_run:
        with caused_by("--unique-ids", "unique ids"):
            dry_run(config, given.unique_ids, given.json)
        return
    if resolved_accelerator(config.trainer.accelerator) == "cpu":
        keep_freed_memory()  # on a GPU's host it would keep what building the model took
    _quieten_lightning()
    _train_as_process(config, resume, callbacks)


def _quieten_lightning() -> None:
    """Hide Lightning's remarks, except that it ends ranks because one of them was lost."""
    importlib.import_module("lightning.pytorch")  # which sets these levels itself
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # it ends the other ranks
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # of rows, which are only read


def _train_as_process(config: RunConfig, resume: RunDirectory | None, callbacks: Sequence["Callback"]) -> None:
    """Train, and end this process as its rank should."""
    try:
        train(config, resume, callbacks)
    except Preempted as stop:
        _tell(str(stop))
        leave(exit_code(stop.signum))  # everything is closed, and taking down the interpreter takes seconds
    except ReportedFailureError:
        leave(FAILED)


if __name__ == "__main__":
    leave_on_stop_signals()
    run_verb(main)
