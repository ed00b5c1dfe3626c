"""The directory of a table while it is built: what is in it, and what has to go."""

import json
import shutil
from pathlib import Path

from src.errors import LutError
from src.files import sync_directory
from src.lut.build_lock import LOCK_NAME
from src.lut.manifest import MANIFEST_NAME, read_manifest
from src.lut.plan import PLAN_NAME, BuildPlan
from src.lut.shard_writer import journal_path


def is_recorded(plan: BuildPlan) -> bool:
    """Whether the directory was prepared for this plan, and is still being built."""
    path = plan.lut_dir / PLAN_NAME
    return path.is_file() and path.read_bytes() == plan.text.encode()


def recorded_precision(lut_dir: Path) -> str | None:
    """Return the precision of the unfinished table in a directory; None where no readable plan says one."""
    try:
        return str(json.loads((lut_dir / PLAN_NAME).read_text(encoding="utf-8"))["precision"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_built(plan: BuildPlan) -> bool:
    """Whether the directory holds the finished table of this plan; LutFormatError when its manifest is damaged."""
    return (plan.lut_dir / MANIFEST_NAME).is_file() and read_manifest(plan.lut_dir) == plan.manifest


def is_empty(lut_dir: Path) -> bool:
    """Whether there is nothing in the directory, or no directory."""
    return not lut_dir.is_dir() or not any(lut_dir.iterdir())


def clear(plan: BuildPlan, *, resume: bool, overwrite: bool) -> None:
    """Remove what an earlier build left, if that is allowed."""
    (plan.lut_dir / MANIFEST_NAME).unlink(missing_ok=True)  # first, so that no half-replaced table is ever readable
    sync_directory(plan.lut_dir)
    leftovers = sorted((*plan.lut_dir.glob("rows-*"), *plan.lut_dir.glob(".*.tmp")))
    if leftovers and resume and not overwrite:
        raise LutError(
            f"{plan.lut_dir}: holds an unfinished table of other weights or another precision; "
            "remove the directory, or --overwrite it"
        )
    for leftover in leftovers:
        leftover.unlink()


def tidy(plan: BuildPlan) -> None:
    """Remove what only a build needs, and what a killed one left; the plan is last, for it says that this is due."""
    for shard in plan.shards:
        journal_path(plan, shard).unlink(missing_ok=True)
    for stray in (*plan.lut_dir.glob(".*.tmp"), *plan.lut_dir.glob("rows-*.partial")):
        stray.unlink(missing_ok=True)
    for name in (PLAN_NAME, LOCK_NAME):
        (plan.lut_dir / name).unlink(missing_ok=True)


def require_space(plan: BuildPlan) -> None:
    """Raise LutError when what is still to be written does not fit the disk."""
    present = sum(path.stat().st_blocks * 512 for path in plan.lut_dir.glob("rows-*"))
    free = shutil.disk_usage(plan.lut_dir).free
    if plan.file_bytes - present > free:
        raise LutError(
            f"{plan.lut_dir}: the table needs {plan.file_bytes - present:,} more bytes, but {free:,} are free; "
            "free some space or choose a smaller --dtype"
        )
