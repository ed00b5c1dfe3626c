"""The optimizer and its learning-rate schedule. Knows parameters, not models."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from src.model.transformer import parameter_part
from src.training.config import Multipliers, OptimizerConfig


def freeze(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> None:
    """Take all but experts and routers out of autograd, if `config` does not train the backbone."""
    for name, parameter in named_parameters:
        if not config.trains_backbone and parameter_part(name) in ("backbone", "embedding"):
            parameter.requires_grad_(False)


def build_optimizer(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW with one group per part of the model; matrices decay, norms and biases do not.

    Groups are named backbone, embedding and experts; their one-dimensional parameters form groups with the suffix
    `_norms`. Routers are in the backbone's group, but where it has multipliers, they are in one of their own.
    """
    members: dict[str, list[nn.Parameter]] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        part, suffix = parameter_part(name), "" if parameter.dim() > 1 else "_norms"
        if part == "routers" and config.backbone_multipliers == Multipliers():
            part = "backbone"
        members.setdefault(part + suffix, []).append(parameter)
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
    """Return the learning rate of optimizer step `step` (from 0) of `total_steps` as a share of the peak."""
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
    """Scale gradients to a global norm of at most `max_norm` (0: no limit) and return the norm before."""
    return nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else math.inf)


def _group_settings(name: str, config: OptimizerConfig) -> dict[str, float]:
    multipliers = {
        "backbone": (config.backbone_multipliers,),
        "embedding": (config.backbone_multipliers, config.embedding_multipliers),
        "experts": (config.expert_multipliers,),
        "routers": (),
    }[name.removesuffix("_norms")]
    rate, decay = config.learning_rate, 0.0 if name.endswith("_norms") else config.weight_decay
    for each in multipliers:
        rate, decay = rate * each.learning_rate, decay * each.weight_decay
    return {"lr": rate, "weight_decay": decay}
