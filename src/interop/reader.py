"""Reads the tensors of a Hugging Face directory by name: safetensors, whole or in shards, or a torch pickle.

Knows files, not models. Shapes are known without reading a tensor, and a large one can be read block by block.
"""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from src.errors import CheckpointError

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
"""In order of preference; each may instead come in shards, listed by NAME.index.json."""


class CheckpointTensors:
    """The tensors of one checkpoint directory."""

    def __init__(self, directory: Path) -> None:
        """Find and open the files; raises CheckpointError naming one that is missing or unreadable."""
        self._tensors: dict[str, Any] = {}  # slices of safetensors, or tensors: both read what they are indexed with
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in _weight_files(directory):
            opened = _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)
            for name, (tensor, shape) in opened.items():
                if name in self.shapes:
                    raise CheckpointError(f"{path}: holds {name}, and so does another shard; copy the checkpoint again")
                self._tensors[name], self.shapes[name] = tensor, shape

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name][:]

    def block(self, name: str, rows: slice, columns: slice) -> Tensor:
        """Read a block of a matrix and nothing else."""
        return self._tensors[name][rows, columns]


def _open_safetensors(path: Path) -> dict[str, tuple[Any, tuple[int, ...]]]:
    try:
        handle: Any = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error}); copy it again") from error
    tensors = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
    return {name: (tensor, tuple(tensor.get_shape())) for name, tensor in tensors.items()}


def _open_pickle(path: Path) -> dict[str, tuple[Any, tuple[int, ...]]]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError) as error:
        raise CheckpointError(
            f"{path}: not a plain state dict that torch.load reads with weights_only=True "
            f"({str(error).splitlines()[0]}); save it as safetensors"
        ) from error
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError(f"{path}: holds more than tensors by name; save the bare state dict")
    return {name: (tensor, tuple(tensor.shape)) for name, tensor in found.items()}


def _weight_files(directory: Path) -> list[Path]:
    for name in SINGLE_FILES:
        if (directory / name).is_file():
            return [directory / name]
        if (directory / f"{name}.index.json").is_file():
            return _shards(directory / f"{name}.index.json")
    raise CheckpointError(
        f"{directory}: holds no weights; expected {', '.join(SINGLE_FILES)} or one of them in shards with an index"
    )


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set[object]()
    if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise CheckpointError(f"{index}: its weight_map must name files of its directory; copy the checkpoint again")
    paths = [index.parent / str(name) for name in sorted(names, key=str)]
    if missing := [path for path in paths if not path.is_file()]:
        raise CheckpointError(f"{missing[0]}: missing, but {index.name} lists it; copy the checkpoint again")
    return paths


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object; raises CheckpointError naming the file when there is none."""
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; give a folder of Hugging Face transformers")
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); copy the checkpoint again") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: holds a {type(document).__name__}, expected an object")
    return document
