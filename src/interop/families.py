"""Families of checkpoints that `convert` reads and writes. Knows none of them: each file of a family registers it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from src.system.console import Progress


class ImportCheckpoint(Protocol):
    """Reads a checkpoint directory into a new run directory."""

    def __call__(
        self, checkpoint_dir: Path, run_dir: Path, *, top_k: int, tokenizer: Path | None, progress: Progress
    ) -> None: ...


class ExportCheckpoint(Protocol):
    """Writes a run as a new checkpoint directory; `lut` names the table of a run without a training form.

    `run_dir` is a `RunDirectory` where the base of a plug-in was named, which `load_model` takes as well.
    """

    def __call__(self, run_dir: Any, checkpoint_dir: Path, *, lut: str, progress: Progress) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Family:
    """Checkpoints of one kind of model."""

    name: str
    """What `--from` and `--to` call it."""
    help: str
    """Whose checkpoints these are, in one line."""
    import_checkpoint: ImportCheckpoint
    export_checkpoint: ExportCheckpoint | None = None
    """None where runs cannot be written as such checkpoints."""
    export_plug_in: ExportCheckpoint | None = None
    """Writes a plug-in without its base; None where that cannot be written."""


FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Let `convert` read `family`, and write it if it has an export."""
    if family.name in FAMILIES:
        raise ValueError(f"{family.name}: a family of that name is registered already; choose another name")
    FAMILIES[family.name] = family
