"""LoRA (arXiv:2106.09685) instead of training the weights: what studies compare plug-ins with.

Every matrix W of a block becomes W + B A, where A (R, D) starts random and B (F, R) at zero; nothing else is trained.
At the end of training the product is added to W, so that the run holds a model like any other.
"""

import math

import lightning
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from src.errors import ConfigError
from src.model import ModelConfig, Transformer
from src.training.lightning_module import LanguageModel
from src.training.strategy import ShardedStrategy


class LowRank(nn.Module):
    """Adds B A to a weight (F, D)."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.a = nn.Parameter(torch.randn(rank, inputs, device=weight.device) / math.sqrt(inputs))
        self.b = nn.Parameter(torch.zeros(outputs, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.b @ self.a).to(weight.dtype)


class LoraCallback(lightning.Callback):
    """Adds the matrices before the optimizer is built, and merges them before the weights are written.

    List it before `ReparameterizeCallback`.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, LanguageModel)
        if isinstance(trainer.strategy, ShardedStrategy):
            raise ConfigError("trainer.strategy: fsdp2, but LoRA is not sharded here; choose another strategy")
        pl_module.model.requires_grad_(False)
        for module in adapted(pl_module.model):
            parametrize.register_parametrization(module, "weight", LowRank(module.weight, self.rank))

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModel)
        for module in adapted(pl_module.model):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def adapted(model: Transformer) -> list[nn.Linear]:
    """Return the modules whose weights get the low-rank sum."""
    return [module for module in model.blocks.modules() if isinstance(module, nn.Linear)]


def count_lora(config: ModelConfig, rank: int) -> int:
    """Return how many parameters are trained."""
    with torch.device("meta"):
        return rank * sum(sum(module.weight.shape) for module in adapted(Transformer(config)))
