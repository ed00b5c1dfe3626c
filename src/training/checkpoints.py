"""The checkpoints directory of a run: one entry per kept step, and links `last.ckpt` and `best.ckpt`.

Knows names and nothing of contents; an entry is a file, or a directory with one part per rank.

Writes a checkpoint tensor by tensor to a file that appears whole or not at all.

Lightning's own writer serialises everything into memory first, which doubles what a large model needs.

The model's weights in a checkpoint, whole or in parts. Knows nothing of optimisers.
"""

import errno
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from src.errors import TrainingError
from src.system.files import atomic_path, sync_directory

_ENTRY = re.compile(r"step-(\d+)\.ckpt")
_UNFINISHED = ".*step-*.tmp"


@dataclass(frozen=True)
class CheckpointFiles:
    """Where the checkpoints of a run lie."""

    directory: Path

    def path(self, step: int) -> Path:
        """The checkpoint after `step` optimiser steps."""
        return self.directory / f"step-{step:08d}.ckpt"

    @staticmethod
    def step(path: Path) -> int:
        """The number of optimiser steps that the checkpoint at `path` holds."""
        match = _ENTRY.fullmatch(path.name)
        assert match is not None
        return int(match[1])

    def steps(self) -> list[int]:
        """Steps whose checkpoints are on disk, in rising order."""
        names = (path.name for path in self.directory.glob("step-*.ckpt"))
        return sorted(int(match[1]) for name in names if (match := _ENTRY.fullmatch(name)))

    def newest(self) -> Path | None:
        """The checkpoint of the highest step; None when there is none."""
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def unfinished_path(self, step: int) -> Path:
        """Where a checkpoint grows that is renamed when it is whole; the same on every rank."""
        return self.directory / f".step-{step:08d}.ckpt.tmp"

    def publish(self, step: int) -> None:
        """Give the unfinished checkpoint of `step` its name, in place of one written before its validation."""
        target = self.path(step)
        if target.is_dir():
            target.rename(replaced := self.directory / f".{target.name}.replaced.tmp")
            self.unfinished_path(step).replace(target)
            _remove(replaced)
        else:
            self.unfinished_path(step).replace(target)

    def remove_unfinished(self) -> None:
        """Remove what writers left behind that were killed."""
        for path in self.directory.glob(_UNFINISHED):
            _remove(path)

    def link(self, name: str, step: int) -> None:
        """Let `name`.ckpt stand for the checkpoint of `step`, from one moment to the next."""
        link = self.directory / f"{name}.ckpt"
        temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(self.path(step).name)
        temporary.replace(link)
        sync_directory(self.directory)

    def prune(self, losses: Mapping[int, float], *, keep_last: int, keep_best: int) -> None:
        """Remove all but the `keep_last` newest and the `keep_best` of lowest loss by step."""
        steps = self.steps()
        kept = {*steps[-keep_last:], *best_steps(losses, keep_best)}
        for step in steps:
            if step not in kept:
                _remove(self.path(step))


def best_steps(losses: Mapping[int, float], count: int) -> list[int]:
    """Return the `count` steps of the lowest loss, lowest first, the earlier one where two are equal."""
    return sorted(losses, key=lambda step: (losses[step], step))[:count]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


class StreamingCheckpointIO(CheckpointIO):
    """`torch.save` into a temporary file beside the target, flushed to disk, then renamed over it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`; TrainingError when the disk is full, and what was there stays."""
        target = Path(path)
        try:
            # With a path instead of an open file, the error of torch's writer would not tell a full disk from others.
            with atomic_path(target) as temporary, temporary.open("wb") as handle:
                torch.save(checkpoint, handle)
        except (OSError, RuntimeError) as error:
            if not is_full(error):
                raise
            raise TrainingError(full_disk_message(target, checkpoint)) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Callable[..., Any] | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Map the file at `path`: tensors are read when they are copied to where they belong."""
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove the file at `path`."""
        Path(path).unlink(missing_ok=True)


def tensor_bytes(value: Any) -> int:
    """Return the bytes of all tensors in nested dictionaries and lists."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(tensor_bytes(item) for item in value.values())
    return sum(tensor_bytes(item) for item in value) if isinstance(value, list | tuple) else 0


def is_full(error: BaseException) -> bool:
    """Whether a write failed because the disk is full. torch's writer raises RuntimeError in the context of OSError."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return error.__context__ is not None and is_full(error.__context__)


def full_disk_message(target: Path, checkpoint: dict[str, Any]) -> str:
    """Say what is whole and what to free, where there is no room for `checkpoint` at `target`."""
    files = CheckpointFiles(target.parent)
    kept, free = files.steps(), shutil.disk_usage(target.parent).free
    last = f"the last good checkpoint is {files.path(kept[-1]).name}" if kept else "there is no earlier checkpoint"
    older = ", ".join(files.path(step).name for step in kept[:-1])
    removable = f"remove older checkpoints ({older}), or " if older else ""
    return (
        f"{target}: no space left to write this checkpoint of about {tensor_bytes(checkpoint):,} bytes, {free:,} are "
        f"free; {last} and is whole; {removable}free that many bytes on this disk, lower checkpoint.keep_last or "
        "checkpoint.keep_best, and go on with --resume"
    )


def read_callback_state(path: Path, callback: str) -> dict[str, Any]:
    """Return what a callback, named by its class, kept in a checkpoint."""
    file = path / "meta.pt" if path.is_dir() else path
    return torch.load(file, map_location="cpu", mmap=True, weights_only=True)["callbacks"].get(callback, {})


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
