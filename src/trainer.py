"""Lightning's Trainer for a run: arguments and callbacks, in the order in which they act."""

import ctypes
import sys
from typing import Literal

import lightning
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, Strategy, StrategyRegistry

from callbacks import (
    BestWeightsCallback,
    CheckpointCallback,
    DashboardCallback,
    EvaluationCallback,
    NonFiniteCallback,
    RandomStateCallback,
    ReparameterizeCallback,
    StepProgressBar,
    ThroughputCallback,
    TimeLimit,
)
from src.checkpointing.streaming import StreamingCheckpointIO
from src.config import RunConfig
from src.data.packed_tokens import PackedCorpus
from src.data.tokenizer import fingerprint
from src.run_directory import RunDirectory
from src.sharding import ShardedStrategy

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


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
        precision=native_precision() if config.precision == "auto" else config.precision,
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


def native_precision() -> Literal["bf16-mixed", "32-true"]:
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
