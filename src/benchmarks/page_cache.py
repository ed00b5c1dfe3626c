"""The state of the page cache, set before a measurement and never on its clock."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from src.errors import UserError


def drop(lut_dir: Path, release: Iterable[Callable[[], None]] = ()) -> None:
    """Take the table's files out of the page cache, so that the next read is cold.

    `release` are called first: pages that a memory map of this process has touched cannot be dropped.
    """
    if not hasattr(os, "posix_fadvise"):
        raise UserError("cold reads can only be measured where posix_fadvise exists (Linux)")
    for unmap in release:
        unmap()
    for path in sorted(lut_dir.glob("rows-*")):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def bytes_read() -> int:
    """Return bytes that this process had the disk read so far; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), 0)
