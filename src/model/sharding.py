"""FSDP2 sharding of the model, in pure torch: which modules form a group, and how weights become whole again."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from src.model.experts import EmbeddingExperts
from src.model.transformer import Transformer


def shard_groups(model: Transformer) -> list[nn.Module]:
    """Return the modules that are whole only while they compute: each block, and each layer's experts."""
    return [*model.blocks, *(model.experts if isinstance(model.experts, EmbeddingExperts) else ())]


def shard_dimension(parameter: Tensor, devices: int) -> int:
    """Return the dimension that devices split: the second of stacked experts, for there may be fewer than devices.

    FSDP2 wants any but the first to divide evenly.
    """
    return 1 if parameter.dim() == 3 and parameter.shape[1] % devices == 0 else 0


def shard_model(model: Transformer, mesh: DeviceMesh) -> None:
    """Shard `model` in place over `mesh`: a group for each of `shard_groups`, the rest in one.

    The rest, embedding and head among it, stays whole from a forward pass until its backward pass, so that the loss
    can read the head. All ranks must hold the same weights before.
    """

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(shard_dimension(parameter, mesh.size()))

    for group in shard_groups(model):
        fully_shard(group, mesh=mesh, shard_placement_fn=placement)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, shard_placement_fn=placement)
    register_fsdp_forward_method(model, "trunk")


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether ranks must compute together to compute at all."""
    return isinstance(model, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor; for a sharded one every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_weights(model: torch.nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Gather a sharded model's weights to the CPU of ranks that `keep` them, one parameter at a time.

    Every rank must call it; a rank that does not keep them gets an empty dictionary.
    """
    return {name: tensor.cpu() for name, tensor in _gathered(model) if keep}


def _gathered(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    state: dict[str, Any] = model.state_dict()
    for name, tensor in state.items():
        yield name, whole(tensor.detach())
