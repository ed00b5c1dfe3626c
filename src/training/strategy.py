"""FSDP2: every rank keeps a part of each parameter, its gradient and its optimiser state. Knows one model class.

Gradients are reduced after each micro-batch, not once per step: to keep them whole until then would cost every rank
what sharding saves.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict

from src.errors import TrainingError
from src.system.private_api import use_all_devices
from src.training.checkpoints import full_disk_message, is_full, tensor_bytes


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's `ModelParallelStrategy` with all devices in one data-parallel group."""

    def __init__(self, *, sharded_checkpoints: bool) -> None:
        """Write checkpoints as one part per rank, or assemble a whole one on rank 0."""
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=sharded_checkpoints)

    def setup_environment(self) -> None:
        """Size the group by the devices there are."""
        use_all_devices(self)
        super().setup_environment()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write it; TrainingError when the disk is full. What ranks raise then is not even an `Exception`."""
        try:
            super().save_checkpoint(checkpoint, filepath, storage_options)
        except CheckpointException as error:
            free = shutil.disk_usage(Path(filepath).parent).free  # errors of other ranks have lost their context
            if free < tensor_bytes(checkpoint) or any(is_full(failure) for failure, _ in error.failures.values()):
                raise TrainingError(full_disk_message(Path(filepath), checkpoint)) from error
            raise RuntimeError(f"{filepath}: cannot be written: {error}") from error

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load model and optimiser in place, and return the rest.

        Whole checkpoints of any strategy will do. Lightning takes their optimiser states for numbered in the order of
        the model's parameters, but an optimiser numbers them group by group.
        """
        path = Path(self.broadcast(checkpoint_path))
        if path.is_dir():
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
    """Return an optimiser's saved state with names for numbers; its groups are those of `optimizer`, in order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups: list[dict[str, Any]] = []
    name_of: dict[int, str] = {}
    for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
        group_names = [names[id(parameter)] for parameter in group["params"]]
        name_of.update(zip(saved["params"], group_names, strict=True))
        groups.append({**saved, "params": group_names})
    return {"state": {name_of[number]: value for number, value in state["state"].items()}, "param_groups": groups}
