"""`python -m src.train`: train, write weights and table, evaluate both forms."""

import ctypes
import importlib.metadata
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, Timer

from callbacks import EvaluationCallback, ReparameterizeCallback, StepProgressBar, ThroughputCallback
from src.cli import parser, run_verb, stderr_console
from src.config import RunConfig, TrainerConfig, describe, load_config
from src.data.datamodule import PackedDataModule
from src.data.packed_tokens import PackedCorpus, prepare_corpus
from src.data.tokenizer import fingerprint, vocabulary_size
from src.errors import DataError
from src.evaluation.held_out import held_out
from src.evaluation.report import Report, update_report
from src.files import write_text
from src.initialization import start_from_run
from src.lightning_module import LanguageModel
from src.run_directory import RunDirectory
from src.tracking import build_loggers

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
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
    callbacks = [*_progress_callbacks(config, run), *_result_callbacks(config, run, corpus, evaluation)]
    trainer = lightning.Trainer(
        **trainer_arguments(config.trainer), callbacks=callbacks, logger=build_loggers(config, run)
    )
    trainer.fit(module, PackedDataModule(corpus, config.data, text.windows))
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


def trainer_arguments(config: TrainerConfig) -> dict[str, Any]:
    """Translate the config section into arguments of Lightning's Trainer."""
    return {
        "accelerator": config.accelerator,
        "devices": config.devices,
        "num_nodes": config.num_nodes,
        "strategy": config.strategy,
        "precision": native_precision() if config.precision == "auto" else config.precision,
        "max_steps": config.max_steps,
        "max_epochs": -1,
        "val_check_interval": config.val_check_interval,
        "check_val_every_n_epoch": None,
        "limit_val_batches": config.limit_val_batches,
        "num_sanity_val_steps": config.num_sanity_val_steps,
        "log_every_n_steps": config.log_every_n_steps,
        "deterministic": config.deterministic,
        "fast_dev_run": config.fast_dev_run,
        "enable_progress_bar": config.enable_progress_bar,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }


def native_precision() -> str:
    """Return bf16-mixed where the accelerator or the processor computes in bfloat16, else 32-true."""
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if native else "32-true"


def keep_freed_memory() -> None:
    """Tell glibc to reuse large freed blocks instead of returning them to the system (elsewhere: do nothing).

    Activations come and go every step; mapping and zeroing their pages anew took a quarter of the quick start's step.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def _require_room_for_tokenizer(corpus: PackedCorpus, config: RunConfig) -> None:
    size = vocabulary_size(corpus.tokenizer)
    if size > config.model.vocab_size:
        raise DataError(
            f"model.vocab_size: {config.model.vocab_size}, but the tokenizer has {size} ids; "
            f"set model.vocab_size={size} or more"
        )


def _progress_callbacks(config: RunConfig, run: RunDirectory) -> list[lightning.Callback]:
    callbacks: list[lightning.Callback] = [ThroughputCallback(), LearningRateMonitor(logging_interval="step")]
    if not config.trainer.fast_dev_run:
        callbacks.append(
            ModelCheckpoint(
                dirpath=run.checkpoints_path,
                monitor="val/loss",
                filename="best",
                save_last=True,
                enable_version_counter=False,
            )
        )
    if config.trainer.enable_progress_bar:
        callbacks.append(StepProgressBar(refresh_rate=5))
    if config.trainer.max_time is not None:
        callbacks.append(Timer(config.trainer.max_time))
    return callbacks


def _result_callbacks(
    config: RunConfig, run: RunDirectory, corpus: PackedCorpus, evaluation: EvaluationCallback
) -> list[lightning.Callback]:
    callbacks: list[lightning.Callback] = []
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
    if config.evaluation.at_fit_end:
        callbacks.append(evaluation)
    return callbacks


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    options = parser("train", (__doc__ or ""), "python -m src.train trainer.max_steps=100 name=try")
    options.add_argument("--config", default=DEFAULT_CONFIG, help=f"YAML config (default: {DEFAULT_CONFIG})")
    options.add_argument("--print-config", action="store_true", help="print every key, its value and meaning, and stop")
    options.add_argument("overrides", nargs="*", metavar="key=value", help="override a config key, such as seed=1")
    given = options.parse_args(arguments)
    config = load_config(given.config, given.overrides)
    if given.print_config:
        print(describe(config))
        return
    keep_freed_memory()
    train(config)


if __name__ == "__main__":
    run_verb(main)
