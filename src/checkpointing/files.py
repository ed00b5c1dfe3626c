"""The checkpoints directory of a run: one entry per kept step, and links `last.ckpt` and `best.ckpt`.

Knows names and nothing of contents; an entry is a file, or a directory with one part per rank.
"""

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from src.system.files import sync_directory

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
