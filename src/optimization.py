"""Objective, optimiser and learning-rate schedule. Knows parameters, not models."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from src.errors import ConfigError
from src.model.parts import parameter_part

Schedule = Literal["cosine", "wsd", "constant"]


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
class Multipliers:
    """What a group of parameters takes of the common settings."""

    learning_rate: float = 1.0
    """Factor on `optimizer.learning_rate`, at least 0; 0 freezes the group."""
    weight_decay: float = 1.0
    """Factor on `optimizer.weight_decay`, at least 0; 0 leaves the group without decay. AdamW takes decay times
    learning rate, so the other factor scales it too."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and the learning rate over `trainer.max_steps`."""

    learning_rate: float = 6e-4
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    """After the warm-up: `cosine` falls until the end, `wsd` holds the peak and falls linearly over the last
    `decay_steps`, `constant` holds it."""
    min_learning_rate_ratio: float = 0.1
    """Final learning rate of `cosine` and `wsd` as a share of the peak, in 0..1."""
    warmup_steps: int = 100
    """Optimiser steps of linear warm-up."""
    decay_steps: int | None = None
    """Optimiser steps of the final decay of `wsd`, which starts no earlier than the warm-up ends; null is a tenth of
    `trainer.max_steps`. Other schedules have no use for it."""
    weight_decay: float = 0.01
    """Decay of every parameter with more than one dimension."""
    embedding_multipliers: Multipliers = field(default_factory=Multipliers)
    """For the token embedding; the vocabulary head, untied, belongs to the backbone and has none."""
    expert_multipliers: Multipliers = field(default_factory=Multipliers)
    """For routed experts, of MoLE and MoE, and their norms; not for routers and the shared expert."""
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
        self._check_decay_steps()
        for name in ("warmup_steps", "weight_decay", "gradient_clip_norm"):
            _require_not_negative(f"optimizer.{name}", getattr(self, name))
        for name, part in (("embedding", self.embedding_multipliers), ("expert", self.expert_multipliers)):
            _require_not_negative(f"optimizer.{name}_multipliers.learning_rate", part.learning_rate)
            _require_not_negative(f"optimizer.{name}_multipliers.weight_decay", part.weight_decay)

    def _check_decay_steps(self) -> None:
        if self.decay_steps is None:
            return
        if self.schedule != "wsd":
            raise ConfigError(
                f"optimizer.decay_steps: {self.decay_steps}, but the {self.schedule} schedule has no final decay; "
                "set it to null, or optimizer.schedule=wsd"
            )
        if self.decay_steps < 1:
            raise ConfigError(f"optimizer.decay_steps: {self.decay_steps}, but it must be at least 1")


def build_optimizer(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with one group per part of the model; matrices decay, norms do not.

    Groups are called backbone, embedding, experts, and with the suffix `_norms` what they hold of one dimension.
    """
    members: dict[str, list[nn.Parameter]] = {}
    for name, parameter in named_parameters:
        suffix = "" if parameter.dim() > 1 else "_norms"
        members.setdefault(parameter_part(name) + suffix, []).append(parameter)
    groups = [
        {"name": name, "params": parameters, **_group_settings(name, config)} for name, parameters in members.items()
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True
    )


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimizerConfig, total_steps: int) -> LambdaLR:
    """Scale every group's learning rate by `learning_rate_factor`."""
    return LambdaLR(optimizer, lambda step: learning_rate_factor(step, config, total_steps))


def learning_rate_factor(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """Learning rate of optimiser step `step` (from 0) of `total_steps` as a share of the peak."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    start = config.warmup_steps
    if config.schedule == "wsd":
        start = max(start, total_steps - (config.decay_steps or max(1, total_steps // 10)))
    progress = min(1.0, max(0.0, (step - start) / max(1, total_steps - start)))
    match config.schedule:
        case "constant":
            remaining = 1.0
        case "cosine":
            remaining = 0.5 * (1 + math.cos(math.pi * progress))
        case "wsd":
            remaining = 1 - progress
    return config.min_learning_rate_ratio + (1 - config.min_learning_rate_ratio) * remaining


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients to a global norm of at most `max_norm` (0: leave them) and return the norm before."""
    return nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else math.inf)


def _group_settings(name: str, config: OptimizerConfig) -> dict[str, float]:
    part = name.removesuffix("_norms")
    multipliers = {"embedding": config.embedding_multipliers, "experts": config.expert_multipliers}.get(part)
    multipliers = multipliers or Multipliers()
    decay = 0.0 if name.endswith("_norms") else config.weight_decay * multipliers.weight_decay
    return {"lr": config.learning_rate * multipliers.learning_rate, "weight_decay": decay}


def _require_not_negative(key: str, value: float) -> None:
    if value < 0:
        raise ConfigError(f"{key}: {value}, but it must not be negative")
