"""How Lightning's Trainer shards a model with FSDP2, and how it writes checkpoints.

With FSDP2 every rank keeps a part of each parameter, its gradient and its optimizer state. Gradients are reduced after
each micro-batch, not once per step: keeping them whole until the end of the step would cost what sharding saves. Where
several groups of ranks hold a copy each, weights are gathered inside a group, and gradients averaged over groups.
"""

import errno
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.kubeflow import KubeflowEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from src.errors import WriteError
from src.system.files import atomic_path, free_bytes, system_error, when_visible
from src.system.private_api import use_all_devices
from src.system.ranks import launcher
from src.training.checkpoints import CheckpointFiles, cannot_write, tensor_bytes
from src.training.config import TrainerConfig


def cluster_environment(config: TrainerConfig) -> ClusterEnvironment:
    """Return how ranks find each other: those that a launcher started, or those that Lightning starts by itself.

    Lightning would guess it, and take any job of SLURM for one whose ranks `srun` has started.
    """
    match launcher()[0]:
        case "srun":  # which need not be told how many tasks a machine has, but Lightning asks
            os.environ["SLURM_NTASKS_PER_NODE"] = str(config.world_size // config.num_nodes)
            return SLURMEnvironment(auto_requeue=False)
        case "torchrun":  # or what sets its variables, such as Kubeflow, with one process on each machine
            return TorchElasticEnvironment() if "LOCAL_RANK" in os.environ else KubeflowEnvironment()
        case _:
            return LightningEnvironment()


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's `ModelParallelStrategy` with all devices in one data-parallel group."""

    def __init__(self, *, shard_devices: int, sharded_checkpoints: bool) -> None:
        """Let each `shard_devices` consecutive ranks hold the model together.

        With `sharded_checkpoints` write one part per rank, else assemble a whole checkpoint on rank 0.
        """
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=sharded_checkpoints)
        self._shard_devices = shard_devices

    def shard_mesh(self) -> DeviceMesh:
        """Return the mesh to shard over; with several groups it has two dimensions, groups and ranks of a group.

        Every rank must call it.
        """
        groups = self.world_size // self._shard_devices
        if groups == 1:
            return self.device_mesh["data_parallel"]
        shape = (groups, self._shard_devices)
        return init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replicate", "shard"))

    def setup_environment(self) -> None:
        use_all_devices(self)
        super().setup_environment()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint; TrainingError if that fails. torch raises no `Exception` but a `BaseException`."""
        try:
            super().save_checkpoint(checkpoint, filepath, storage_options)
        except CheckpointException as error:
            path, needed = Path(filepath), tensor_bytes(checkpoint)
            found = [system_error(failure) for failure, _ in error.failures.values()]
            if free_bytes(path.parent) < needed:  # errors of other ranks have lost their context
                found.append(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
            if (failure := next(filter(None, found), None)) is None:
                raise RuntimeError(f"{filepath}: could not be written: {error}") from error
            named = OSError(failure.errno, failure.strerror, str(path))
            raise cannot_write(named, CheckpointFiles(path.parent), needed) from error

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load model and optimizer in place, and return the rest.

        Accepts whole checkpoints of any strategy. Lightning expects their optimizer states to be numbered in the order
        of the model's parameters, but an optimizer numbers them group by group.
        """
        path, in_parts = self.broadcast((Path(checkpoint_path), Path(checkpoint_path).is_dir()))
        if in_parts:
            return super().load_checkpoint(path, weights_only=weights_only)
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        assert self.model is not None
        set_model_state_dict(self.model, checkpoint.pop("state_dict"), options=options)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            named = _named_optimizer_state(state, optimizer, self.model)
            set_optimizer_state_dict(self.model, optimizer, optim_state_dict=named, options=options)
        return checkpoint


def _named_optimizer_state(
    state: dict[str, Any], optimizer: torch.optim.Optimizer, model: torch.nn.Module
) -> dict[str, Any]:
    """Return a saved optimizer state by parameter name instead of number; its groups are those of `optimizer`."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups: list[dict[str, Any]] = []
    name_of: dict[int, str] = {}
    for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
        group_names = [names[id(parameter)] for parameter in group["params"]]
        name_of.update(zip(saved["params"], group_names, strict=True))
        groups.append({**saved, "params": group_names})
    return {"state": {name_of[number]: value for number, value in state["state"].items()}, "param_groups": groups}


class StreamingCheckpointIO(CheckpointIO):
    """Writes a checkpoint tensor by tensor into a temporary file, flushes it to disk, and renames it to the target.

    Lightning's own writer serializes everything into memory first.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`; TrainingError if that fails, and an earlier file stays."""
        target = Path(path)
        try:
            # Given a path instead of an open file, torch's writer raises the same error for a full disk as for others.
            with atomic_path(target) as temporary, temporary.open("wb") as handle:
                torch.save(checkpoint, handle)
        except WriteError as error:
            raise cannot_write(error, CheckpointFiles(target.parent), tensor_bytes(checkpoint)) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Callable[..., Any] | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load the file that rank 0 chose: on a network disk, other machines may not see the newest one yet."""
        load = partial(torch.load, map_location="cpu", mmap=True, weights_only=True)
        if not torch.distributed.is_initialized():
            return load(path)
        torch.distributed.broadcast_object_list(chosen := [path])
        return load(path) if torch.distributed.get_rank() == 0 else when_visible(partial(load, chosen[0]))

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)
