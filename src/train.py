"""`python -m src.train`: train, write weights and table, evaluate both forms."""

import importlib.metadata
import json
import logging
import platform
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning
from lightning.fabric.utilities.rank_zero import rank_zero_only
from rich.console import Console

from callbacks import EvaluationCallback
from src.accounting import account, print_account
from src.cli import parser, run_verb, stderr_console
from src.config import RunConfig, describe, load_config
from src.data.datamodule import PackedDataModule
from src.data.packed_tokens import PackedCorpus, prepare_corpus
from src.data.tokenizer import vocabulary_size
from src.errors import DataError
from src.evaluation.held_out import held_out
from src.evaluation.report import Report, update_report
from src.files import write_text
from src.initialization import start_from_run
from src.lightning_module import LanguageModel
from src.run_directory import RunDirectory
from src.tracking import build_loggers, close_loggers
from src.trainer import build_trainer, keep_freed_memory, progress_callbacks, result_callbacks

DEFAULT_CONFIG = "configs/quickstart.yaml"


@dataclass(frozen=True)
class RunResult:
    """What a training run left behind."""

    run_dir: Path
    report: Report | None
    """None when `evaluation.at_fit_end` is off."""


def train(config: RunConfig) -> RunResult:
    """Train as `config` says, and return where the results lie and what they are.

    Raises:
        UserError: the config, corpus or tokenizer cannot be used.
    """
    console = stderr_console()
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    with console.status("reading and tokenizing the corpus"):
        corpus = prepare_corpus(config.data)
    _require_room_for_tokenizer(corpus, config)
    text = held_out(corpus, config.data, config.model.vocab_size)
    module = LanguageModel(config.model, config.objective, config.optimizer, text.byte_lengths)
    if config.init_from is not None:
        start_from_run(module.model, RunDirectory(Path(config.init_from)), corpus.tokenizer)
    run = create_run(config, corpus)
    evaluation = EvaluationCallback(
        run.path,
        config.evaluation,
        text=text,
        tokens_per_step=config.data.global_batch_size * config.data.sequence_length,
        console=console,
    )
    callbacks = [*progress_callbacks(config, run), *result_callbacks(config, run, corpus, evaluation)]
    loggers, failed = build_loggers(config, run), True
    try:
        trainer = build_trainer(config.trainer, callbacks, loggers)
        trainer.fit(module, PackedDataModule(corpus, config.data, text.windows))
        failed = False
    finally:
        close_loggers(loggers, failed=failed)
    return RunResult(run.path, evaluation.report)


def create_run(config: RunConfig, corpus: PackedCorpus) -> RunDirectory:
    """Claim a new run directory, numbered if the name is taken, and write config and tokenizer; on rank 0 only."""
    root = Path(config.output_dir)
    if rank_zero_only.rank != 0:  # pyright: ignore[reportFunctionMemberAccess]
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
    update_report(run.report_path, {"corpus": corpus.facts(), "software": software_versions()})
    return run


def software_versions() -> dict[str, str]:
    """Return what the numbers of a run may depend on."""
    packages = ("mole", "torch", "lightning", "tokenizers")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def _require_room_for_tokenizer(corpus: PackedCorpus, config: RunConfig) -> None:
    size = vocabulary_size(corpus.tokenizer)
    if size > config.model.vocab_size:
        raise DataError(
            f"model.vocab_size: {config.model.vocab_size}, but the tokenizer has {size} ids; "
            f"set model.vocab_size={size} or more"
        )


def dry_run(config: RunConfig, unique_ids: int | None = None, json_path: Path | None = None) -> None:
    """Print what a run of `config` costs, and write it to `json_path`; reads no corpus and allocates no model."""
    costs = account(
        config.model,
        sequence_length=config.data.sequence_length,
        micro_batch_size=config.data.micro_batch_size,
        precision=config.trainer.precision,
        unique_ids=unique_ids,
    )
    print_account(costs, Console())
    if json_path is not None:
        write_text(json_path, json.dumps(costs.to_dict(), indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    options = parser("train", (__doc__ or ""), "python -m src.train trainer.max_steps=100 name=try")
    options.add_argument("--config", default=DEFAULT_CONFIG, help=f"YAML config (default: {DEFAULT_CONFIG})")
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
    config = load_config(given.config, given.overrides)
    if given.print_config:
        print(describe(config))
        return
    if given.dry_run:
        dry_run(config, given.unique_ids, given.json)
        return
    keep_freed_memory()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    train(config)


if __name__ == "__main__":
    run_verb(main)
