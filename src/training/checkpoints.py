"""The checkpoints of a run on disk: which are kept, what they hold, and what to say when there is no room for one.

The directory has one entry per kept step, a file or a directory with one part per rank, and the links `last.ckpt` and
`best.ckpt`: symbolic links where the file system has them, else hard links, else text files that hold the name. Knows
nothing of optimizers, and reads without Lightning.
"""

import errno
import os
import re
import shutil
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from src.errors import DISK_FULL, LutWriteError, RunError, TrainingError
from src.system.files import free_bytes, sync_directory, system_error

_ENTRY = re.compile(r"step-(\d+)\.ckpt")
_LONGEST_ENTRY = 64
"""Bytes of a name that `_ENTRY` matches, at most."""
_UNFINISHED = ".*.tmp"


@dataclass(frozen=True)
class CheckpointFiles:
    """The directory with the checkpoints of a run."""

    directory: Path

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}.ckpt"

    @staticmethod
    def step(path: Path) -> int:
        match = _ENTRY.fullmatch(path.name)
        assert match is not None
        return int(match[1])

    def steps(self) -> list[int]:
        names = (path.name for path in self.directory.glob("step-*.ckpt"))
        return sorted(int(match[1]) for name in names if (match := _ENTRY.fullmatch(name)))

    def newest(self) -> Path | None:
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def unfinished_path(self, step: int) -> Path:
        """Return the path of a checkpoint while it is written, the same on every rank; it is then renamed."""
        return self.directory / f".step-{step:08d}.ckpt.tmp"

    def publish(self, step: int) -> None:
        """Give the unfinished checkpoint of `step` its name, in place of one written before its validation."""
        target = self.path(step)
        if target.is_dir():
            target.rename(replaced := self.directory / f".{target.name}.replaced.tmp")
            try:
                self.unfinished_path(step).replace(target)
            except OSError:
                replaced.rename(target)
                raise
            _remove(replaced)
        else:
            self.unfinished_path(step).replace(target)

    def remove_unfinished(self) -> None:
        """Remove unfinished checkpoints of killed writers."""
        for path in self.directory.glob(_UNFINISHED):
            _remove(path)

    def link(self, name: str, step: int) -> None:
        """Make `name`.ckpt a link to the checkpoint of `step`, atomically; `linked` follows it."""
        link, target = self.directory / f"{name}.ckpt", self.path(step)
        temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
        temporary.unlink(missing_ok=True)
        try:
            _make_link(temporary, target)
            if link.is_dir() and not link.is_symlink():  # in a copy of a run whose links were followed
                shutil.rmtree(link)
            temporary.replace(link)
        finally:
            temporary.unlink(missing_ok=True)  # renaming a hard link over another one of its file leaves both
        sync_directory(self.directory)

    def prune(self, losses: Mapping[int, float], *, keep_last: int, keep_best: int) -> None:
        """Remove all but the `keep_last` newest and the `keep_best` of lowest loss by step."""
        steps = self.steps()
        kept = {*steps[-keep_last:], *best_steps(losses, keep_best)}
        for step in steps:
            if step not in kept:
                _remove(self.path(step))


def _make_link(link: Path, target: Path) -> None:
    """Link to a file or directory next to `link`, in the best way that the file system has."""
    try:
        link.symlink_to(target.name)
    except (OSError, NotImplementedError):
        try:
            link.hardlink_to(target)
        except (OSError, NotImplementedError):  # a directory cannot have one
            link.write_text(target.name, encoding="utf-8")


def linked(path: Path) -> Path:
    """Return the checkpoint that a link made of text names; any other path unchanged."""
    if path.is_file() and path.stat().st_size <= _LONGEST_ENTRY:
        name = path.read_bytes().decode("utf-8", "replace")
        return path.with_name(name) if _ENTRY.fullmatch(name) else path
    return path


def best_steps(losses: Mapping[int, float], count: int) -> list[int]:
    """Return the `count` steps of the lowest loss, lowest first, of equal ones the earlier first."""
    return sorted(losses, key=lambda step: (losses[step], step))[:count]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def tensor_bytes(value: Any) -> int:
    """Return the bytes of all tensors in nested dictionaries and lists."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(tensor_bytes(item) for item in value.values())
    return sum(tensor_bytes(item) for item in value) if isinstance(value, list | tuple) else 0


def is_full(error: BaseException) -> bool:
    """Whether a write failed because the disk is full, whichever library was writing."""
    failure = system_error(error)
    return failure is not None and failure.errno in DISK_FULL


def cannot_write(failure: OSError | LutWriteError, files: CheckpointFiles, needed: int | None = None) -> TrainingError:
    """Return the error that ends a run when it cannot write a file, of `needed` bytes if that is known.

    It says which checkpoint is left, what to free, and how to continue.
    """
    run, kept = files.directory.parent, files.steps()
    no_space = is_full(failure)
    if isinstance(failure, LutWriteError):
        no_space |= failure.__cause__ is None  # found before anything was written
        told = [str(failure)]
    else:
        told = [f"{failure.filename or run}: cannot be written ({failure.strerror})"]
    if no_space:
        size = f", and this file needs about {needed:,} bytes" if needed else ""
        told.append(f"{free_bytes(run):,} bytes are free{size}")
    if kept:
        told.append(f"the last good checkpoint is {files.path(kept[-1]).name} (step {kept[-1]}) and is complete")
    else:
        told.append("there is no earlier checkpoint")
    if no_space:
        older = ", ".join(files.path(step).name for step in kept[:-1])
        older = f"remove older checkpoints ({older}), or " if older else ""
        told.append(f"{older}free space on this disk, lower checkpoint.keep_last or checkpoint.keep_best")
    else:
        told.append(f"make {run} writable again")
    return TrainingError(f"{'; '.join(told)}, and {f'continue with --resume {run}' if kept else 'start the run again'}")


def _is_of_run(failure: OSError, run: Path) -> bool:
    """Whether an error is a full disk, or about a file of the run (and not about the limit of open files)."""
    name, is_limit = failure.filename, failure.errno in (errno.EMFILE, errno.ENFILE)
    is_inside = isinstance(name, str) and Path(name).absolute().is_relative_to(run.absolute())
    return is_full(failure) or (is_inside and not is_limit)


def explain_write_failure(error: BaseException, run: Path) -> TrainingError | None:
    """Return `cannot_write` if a file of `run` could not be written; None for other errors, and what is explained."""
    failure: BaseException | None = None if isinstance(error, TrainingError) else error
    while failure is not None:
        if isinstance(failure, LutWriteError) or (isinstance(failure, OSError) and _is_of_run(failure, run)):
            return cannot_write(failure, CheckpointFiles(run / "checkpoints"))
        failure = failure.__cause__ or failure.__context__
    return None


@contextmanager
def explaining_write_failures(run: Path) -> Generator[None]:
    """Say which checkpoint is left when a file of `run` cannot be written."""
    try:
        yield
    except Exception as error:
        if (explained := explain_write_failure(error, run)) is None:
            raise
        raise explained from error


def read_callback_state(path: Path, callback: str) -> dict[str, Any]:
    """Return the state of a callback, named by its class, in a checkpoint."""
    path = linked(path)
    file = path / "meta.pt" if path.is_dir() else path
    return torch.load(file, map_location="cpu", mmap=True, weights_only=True)["callbacks"].get(callback, {})


_FILE_PREFIX, _PARTS_PREFIX = "model.", "state_dict.model."


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return a checkpoint's weights by their names in `Transformer`.

    A whole checkpoint is mapped, not read; the parts of ranks are joined in memory. RunError where `path` is none.
    """
    path = linked(path)
    try:
        weights = _read_parts(path) if path.is_dir() else _read_whole(path)
    except (OSError, EOFError, RuntimeError, LookupError, TypeError, ValueError, UnpicklingError) as error:
        reason = str(error).partition("\n")[0][:120] or type(error).__name__
        raise RunError(f"{path}: not a readable checkpoint ({reason}); name another one, or copy it again") from error
    if not weights:
        raise RunError(f"{path}: holds no weights of a model; name a checkpoint that was written here")
    return weights


def _read_whole(path: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["state_dict"]
    return {name.removeprefix(_FILE_PREFIX): state[name] for name in state if name.startswith(_FILE_PREFIX)}


def _read_parts(path: Path) -> dict[str, Tensor]:
    from torch.distributed.checkpoint.filesystem import FileSystemReader  # takes as long to import as torch
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    described = FileSystemReader(path).read_metadata().state_dict_metadata
    parts: dict[str, Tensor] = {
        name: torch.empty(item.size, dtype=item.properties.dtype)
        for name, item in described.items()
        if name.startswith(_PARTS_PREFIX) and isinstance(item, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # not needed for one process
        load(parts, storage_reader=FileSystemReader(path), no_dist=True)
    return {name.removeprefix(_PARTS_PREFIX): tensor for name, tensor in parts.items()}
