"""FSDP2 sharding of the model, in pure torch: the groups of modules, and how to gather whole weights."""

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from src.model.experts import EmbeddingExperts
from src.model.router import Router
from src.model.transformer import Transformer


def shard_groups(model: Transformer) -> list[nn.Module]:
    """Return the modules that FSDP2 gathers only while they compute: each block, and each layer's experts."""
    return [*model.blocks, *(model.experts if isinstance(model.experts, EmbeddingExperts) else ())]


def wide_modules(group: nn.Module) -> list[nn.Module]:
    """Return the modules of a group that compute in float32 under autocast too, and so are gathered in it."""
    return [module for module in group.modules() if isinstance(module, nn.RMSNorm | Router)]


def shard_dimension(parameter: Tensor, devices: int) -> int:
    """Return the dimension that is split over devices: the second of stacked experts, of which there may be too few.

    FSDP2 requires any dimension but the first to divide evenly.
    """
    return 1 if parameter.dim() == 3 and parameter.shape[1] % devices == 0 else 0


def shard_model(model: Transformer, mesh: DeviceMesh, *, gathered: torch.dtype | None = None) -> None:
    """Shard `model` in place over `mesh`: one group for each of `shard_groups`, and one for all other modules.

    A mesh of two dimensions holds a copy of the model in each of its rows.

    The others, embedding and head among them, stay whole from a forward pass until its backward pass, so that the loss
    can read the head. All ranks must hold the same weights before, or none, on `meta`.

    `gathered` is the dtype that autocast computes in, and groups are gathered in it: half the bytes of weights that
    autocast would round anyway. `wide_modules`, embedding and head stay in float32, as do all sums of gradients.
    """

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(shard_dimension(parameter, mesh.size(mesh.ndim - 1)))

    policy = MixedPrecisionPolicy(gathered, torch.float32 if gathered else None, cast_forward_inputs=False)
    for group in shard_groups(model):
        if gathered and (wide := wide_modules(group)):
            fully_shard(wide, mesh=mesh, shard_placement_fn=placement)
        fully_shard(group, mesh=mesh, shard_placement_fn=placement, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, shard_placement_fn=placement)
    register_fsdp_forward_method(model, "trunk")


def shard_from_rank_zero(
    model: Transformer, mesh: DeviceMesh, device: torch.device, *, gathered: torch.dtype | None = None
) -> None:
    """Shard `model` over `mesh` and fill every rank's parts from the weights of rank 0; elsewhere it may be on `meta`.

    So one process holds whole weights, not every rank, and one tensor at a time is whole on the devices. Nothing may be
    on `meta` afterwards, or Lightning would draw other weights.
    """
    weights = model.state_dict() if torch.distributed.get_rank() == 0 else {}
    model.to("meta")  # `weights` keep their storage
    shard_model(model, mesh, gathered=gathered)
    model.to_empty(device=device)
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether the model is sharded, so that all ranks must compute together."""
    return isinstance(model, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor; for a sharded one every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_weights(model: torch.nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Gather a sharded model's weights on the CPU, one parameter at a time.

    Every rank must call it; ranks that do not `keep` the weights get an empty dictionary.
    """
    state: dict[str, Tensor] = model.state_dict()
    gathered = ((name, whole(tensor.detach())) for name, tensor in state.items())
    return {name: tensor.cpu() for name, tensor in gathered if keep}
