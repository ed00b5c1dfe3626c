"""What tables are built from: anything that computes one layer's expert rows for a run of token ids."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from src.errors import LutError
from src.model import ModelConfig, Transformer
from src.model.experts import EmbeddingExperts, LayerExperts
from src.run_directory import EXPERTS_PREFIX, Identity, RunDirectory, identify


class RowSource(Protocol):
    """Computes expert rows; `config` gives the table's sizes, `identity` the weights it stands for."""

    config: ModelConfig
    identity: Identity

    def layer_rows(self, layer: int, first_token: int, num_tokens: int) -> Tensor:
        """Return (num_tokens, E, D) rows of consecutive ids, computed in at least float32."""
        ...


def require_lookup_form(config: ModelConfig) -> None:
    """Raise LutError for a model that cannot become a table."""
    if config.architecture != "mole":
        reason = "has no routed experts" if config.architecture == "dense" else "has experts that read hidden states"
        raise LutError(
            f"this {config.architecture} model {reason}, so there is nothing to look up by token id; "
            "only experts with model.expert_input=embedding become a table"
        )


class ModelRows:
    """Rows of a model in memory, on whatever device it lies."""

    def __init__(self, model: Transformer) -> None:
        """Take the model as it is now; its identity is computed from its weights."""
        require_lookup_form(model.config)
        if not isinstance(model.experts, EmbeddingExperts):
            raise LutError("this model is already in its lookup form; build from its training form or from its table")
        self.config, self._model, self._experts = model.config, model, model.experts
        weights = model.state_dict()
        experts = {name: tensor for name, tensor in weights.items() if name.startswith(EXPERTS_PREFIX)}
        self.identity = identify({name: weights[name] for name in weights if name not in experts}, experts)

    def layer_rows(self, layer: int, first_token: int, num_tokens: int) -> Tensor:
        """Run one layer's experts on the embedding rows of consecutive ids."""
        embeddings = self._model.embedding.weight[first_token : first_token + num_tokens]
        return _compute(self._experts[layer], embeddings)


@dataclass
class RunRows:
    """Rows of a run directory, reading one layer's experts at a time instead of loading the model."""

    run: RunDirectory

    def __post_init__(self) -> None:
        """Check the run's parts; nothing is loaded yet."""
        self.config, self.identity = self.run.model_config(), self.run.identity()
        require_lookup_form(self.config)
        if not self.run.experts_path.is_file():
            raise LutError(
                f"{self.run.experts_path}: missing, so this run holds no training form to build a table from"
            )

    def layer_rows(self, layer: int, first_token: int, num_tokens: int) -> Tensor:
        """Read one layer's experts and the embedding rows of consecutive ids, and run them."""
        with safe_open(self.run.backbone_path, framework="pt") as handle:
            embeddings = handle.get_slice("embedding.weight")[first_token : first_token + num_tokens]
        with torch.device("meta"):
            experts = LayerExperts(self.config)
        prefix = f"{EXPERTS_PREFIX}{layer}."
        with safe_open(self.run.experts_path, framework="pt") as handle:
            weights = {name: handle.get_tensor(prefix + name) for name in experts.state_dict()}
        experts.load_state_dict(weights, assign=True)
        return _compute(experts, embeddings)


def open_source(source: Transformer | RunDirectory | Path | str) -> RowSource:
    """Return the row source of a model or of a run directory."""
    if isinstance(source, Transformer):
        return ModelRows(source)
    return RunRows(source if isinstance(source, RunDirectory) else RunDirectory(Path(source)))


@torch.no_grad()
def _compute(experts: torch.nn.Module, embeddings: Tensor) -> Tensor:
    with torch.autocast(embeddings.device.type, enabled=False):
        return experts(embeddings).to(torch.promote_types(embeddings.dtype, torch.float32))
