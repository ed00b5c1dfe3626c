"""What each device keeps in memory while a model trains: what lasts, by strategy, and what experts add for a while.

Builds the model on the meta device: shapes, no storage.

D hidden, F an expert's intermediate, E experts, L layers, U token ids that the experts run on.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from src.model import ModelConfig, Transformer
from src.sharding import shard_dimension, shard_groups


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Bytes on the fullest device that hold as long as training does; activations come on top."""

    strategy: str
    """`whole`: one device alone, or each of DDP's, however many; `fsdp2`."""
    devices: int
    """How many share what `fsdp2` shards."""
    weights: int
    gradients: int
    optimizer_states: int
    """AdamW's two moments."""
    gathered: int
    """What FSDP2 holds whole for a while, at most: weights and gradients of embedding and head, and of two groups."""

    @property
    def total(self) -> int:
        """All four."""
        return self.weights + self.gradients + self.optimizer_states + self.gathered


@dataclass(frozen=True, kw_only=True)
class ExpertMemory:
    """What one form of expert execution keeps from the forward pass for the backward pass, over all layers."""

    execution: str
    token_ids: int
    """How many ids, distinct or not, the experts run on at once."""
    kept_bytes: int


def value_bytes(precision: str) -> int:
    """Bytes of a stored weight, gradient or moment under `trainer.precision`; autocast keeps float32."""
    return {"bf16-true": 2, "64-true": 8}.get(precision, 4)


def whole_memory(num_parameters: int, precision: str) -> DeviceMemory:
    """Memory of a device that holds the whole model; DDP's buckets are its gradients."""
    stored = num_parameters * value_bytes(precision)
    return DeviceMemory(
        strategy="whole", devices=1, weights=stored, gradients=stored, optimizer_states=2 * stored, gathered=0
    )


def sharded_memory(model: ModelConfig, precision: str, devices: int) -> DeviceMemory:
    """Memory of one of `devices` under FSDP2: its part of everything, and what it gathers to compute.

    At most two groups are whole at a time, one computing and one on its way, and so are their gradients; the
    embedding and the head stay whole throughout (`src.sharding.shard_model`).
    """
    with torch.device("meta"):
        built = Transformer(model)
    size = value_bytes(precision)
    groups = [_num_values(group) for group in shard_groups(built)]
    gathered = _num_values(built) - sum(groups) + sum(sorted(groups)[-2:])
    part = size * sum(_largest_part(parameter, devices) for parameter in built.parameters())
    return DeviceMemory(
        strategy="fsdp2",
        devices=devices,
        weights=part,
        gradients=part,
        optimizer_states=2 * part,
        gathered=2 * size * gathered,
    )


def expert_memory(model: ModelConfig, execution: str, num_ids: int, precision: str) -> ExpertMemory:
    """Memory that embedding experts take for the backward pass when they run on `num_ids` ids at once.

    Per layer and id: the normed embedding, every expert's input, its F values before and after GELU, and its row in at
    least float32, which the mixture keeps. Checkpointing keeps the rows alone. `unique_per_step` adds their gradients.
    """
    stored = value_bytes(precision)
    computed, wide = 2 if "16" in precision else stored, max(stored, 4)
    vectors, inner = model.num_experts * model.hidden_size, model.num_experts * model.expert_intermediate_size
    if not model.gradient_checkpointing:
        inputs = computed * (model.hidden_size if computed == stored else vectors)  # autocast repeats what it casts
        per_id = wide * vectors + 2 * computed * inner + inputs + stored * (model.hidden_size + 1)
    else:
        per_id = vectors * (wide if execution == "unique_per_step" else computed)
    if execution == "unique_per_step":
        per_id += wide * vectors
    return ExpertMemory(execution=execution, token_ids=num_ids, kept_bytes=model.num_layers * num_ids * per_id)


def _largest_part(parameter: Tensor, devices: int) -> int:
    length = parameter.shape[shard_dimension(parameter, devices)]
    return -(-length // devices) * (parameter.numel() // length)


def _num_values(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
