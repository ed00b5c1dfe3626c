"""Writes a checkpoint tensor by tensor to a file that appears whole or not at all.

Lightning's own writer serialises everything into memory first, which doubles what a large model needs.
"""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.types import _PATH

from src.checkpointing.files import CheckpointFiles
from src.errors import TrainingError
from src.system.files import atomic_path


class StreamingCheckpointIO(CheckpointIO):
    """`torch.save` into a temporary file beside the target, flushed to disk, then renamed over it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`; TrainingError when the disk is full, and what was there stays."""
        target = Path(path)
        try:
            with atomic_path(target) as temporary:
                torch.save(checkpoint, temporary)
        except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as a RuntimeError
            if not is_full(error):
                raise
            raise TrainingError(full_disk_message(target, checkpoint)) from error

    def load_checkpoint(
        self, path: _PATH, map_location: Callable[..., Any] | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Map the file at `path`: tensors are read when they are copied to where they belong."""
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)

    def remove_checkpoint(self, path: _PATH) -> None:
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
    """Whether a write failed for want of space."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return "PytorchStreamWriter" in str(error) or "unexpected pos" in str(error)


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
