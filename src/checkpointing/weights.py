"""The model's weights in a checkpoint, whole or in parts. Knows nothing of optimisers."""

import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

_FILE_PREFIX, _PARTS_PREFIX = "model.", "state_dict.model."


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return a checkpoint's weights by their names in `Transformer`.

    Those of a whole checkpoint are mapped, not read; parts of ranks are put together in memory.
    """
    if path.is_dir():
        return _read_parts(path)
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["state_dict"]
    return {name.removeprefix(_FILE_PREFIX): state[name] for name in state if name.startswith(_FILE_PREFIX)}


def _read_parts(path: Path) -> dict[str, Tensor]:
    described = FileSystemReader(path).read_metadata().state_dict_metadata
    parts: dict[str, Tensor] = {
        name: torch.empty(item.size, dtype=item.properties.dtype)
        for name, item in described.items()
        if name.startswith(_PARTS_PREFIX) and isinstance(item, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is all it takes
        load(parts, storage_reader=FileSystemReader(path), no_dist=True)
    return {name.removeprefix(_PARTS_PREFIX): tensor for name, tensor in parts.items()}
