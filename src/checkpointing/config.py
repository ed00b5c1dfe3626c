"""Which checkpoints a run writes and keeps, and which weights it ends with."""

from dataclasses import dataclass
from typing import Literal

from src.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints, for resuming and for choosing weights."""

    every_steps: int | None = None
    """Optimiser steps between checkpoints, beside those after each validation and after the last step; null writes
    only these."""
    keep_last: int = 1
    """Newest checkpoints that stay on disk, at least 1."""
    keep_best: int = 1
    """Checkpoints of the lowest validation loss that stay on disk; 0 keeps none for their loss."""
    sharded: bool = False
    """With trainer.strategy=fsdp2: every rank writes its part into a directory, instead of rank 0 a whole file."""
    ema_decay: float | None = None
    """Decay per step of an exponential moving average of the weights, above 0 and below 1. Validation, table and
    checkpoints then use the average; training goes on with its own weights. null averages nothing."""
    final_weights: Literal["last", "best"] = "last"
    """Weights that a fit ends with, which become backbone, experts and table: those of the last step, or of the
    checkpoint with the lowest validation loss."""

    def __post_init__(self) -> None:
        """Raise ConfigError on values out of range."""
        if self.every_steps is not None and self.every_steps < 1:
            raise ConfigError(f"checkpoint.every_steps: {self.every_steps}, but it must be at least 1")
        if self.keep_last < 1:
            raise ConfigError(f"checkpoint.keep_last: {self.keep_last}, but it must be at least 1")
        if self.keep_best < 0:
            raise ConfigError(f"checkpoint.keep_best: {self.keep_best}, but it must not be negative")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError(f"checkpoint.ema_decay: {self.ema_decay}, but it must lie between 0 and 1")
        if self.final_weights == "best" and self.keep_best < 1:
            raise ConfigError("checkpoint.final_weights: best, but checkpoint.keep_best is 0; keep at least 1")
