"""Objective, optimiser and learning-rate schedule. Knows parameters, not models."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from src.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is added to the language-model loss; both terms are logged whatever their weight."""

    load_balance_weight: float = 0.0
    """Weight of the load-balance loss, per micro-batch, mean over layers; the paper uses 0 for MoLE, 0.01 for MoE."""
    z_loss_weight: float = 0.0
    """Weight of the router z-loss, per micro-batch, mean over layers; the paper uses 0 for MoLE, 0.001 for MoE."""

    def __post_init__(self) -> None:
        """Raise ConfigError on negative weights."""
        for name in ("load_balance_weight", "z_loss_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"objective.{name}: {getattr(self, name)}, but it must not be negative")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a warm-up and a cosine decay over `trainer.max_steps`."""

    learning_rate: float = 6e-4
    """Peak learning rate."""
    min_learning_rate_ratio: float = 0.1
    """Final learning rate as a share of the peak, in 0..1."""
    warmup_steps: int = 100
    """Optimiser steps of linear warm-up."""
    weight_decay: float = 0.01
    """Decay of every parameter with more than one dimension."""
    beta1: float = 0.9
    """Adam's decay of the first moment."""
    beta2: float = 0.95
    """Adam's decay of the second moment."""
    epsilon: float = 1e-8
    """Adam's denominator offset."""
    gradient_clip_norm: float = 1.0
    """Largest global gradient norm; 0 does not clip."""

    def __post_init__(self) -> None:
        """Raise ConfigError on values out of range."""
        if self.learning_rate <= 0:
            raise ConfigError(f"optimizer.learning_rate: {self.learning_rate}, but it must be above 0")
        if not 0 <= self.min_learning_rate_ratio <= 1:
            raise ConfigError(
                f"optimizer.min_learning_rate_ratio: {self.min_learning_rate_ratio}, but it must lie in 0..1"
            )
        for name in ("warmup_steps", "weight_decay", "gradient_clip_norm"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optimizer.{name}: {getattr(self, name)}, but it must not be negative")


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves norms alone."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True
    )


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimizerConfig, total_steps: int) -> LambdaLR:
    """Linear warm-up, then cosine to `min_learning_rate_ratio` at `total_steps`."""
    return LambdaLR(optimizer, lambda step: learning_rate_factor(step, config, total_steps))


def learning_rate_factor(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """Learning rate of optimiser step `step` (from 0) as a share of the peak."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    low = config.min_learning_rate_ratio
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients to a global norm of at most `max_norm` (0: leave them) and return the norm before."""
    return nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else math.inf)
