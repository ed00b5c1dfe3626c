"""Locks that keep two builders out of one directory. The kernel lets go when a process ends, however it ends."""

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from src.errors import LutBusyError

LOCK_NAME = "build.lock"


@contextmanager
def building(lut_dir: Path, *, shared: bool, wait: bool = False) -> Generator[None]:
    """Hold the directory: alone, or shared with other ranks of the same build.

    LutBusyError when somebody else holds it, unless `wait` asks to stand in line.
    """
    descriptor = lock_file(lut_dir / LOCK_NAME, shared=shared, wait=wait)
    try:
        yield
    finally:
        os.close(descriptor)


def lock_file(path: Path, *, shared: bool = False, wait: bool = False) -> int:
    """Open (or create) a file, lock it, and return its descriptor; closing it unlocks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
            if _is_still(path, descriptor):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise LutBusyError(
                f"{path.parent}: another process is building this table; wait for it, or choose another --lut"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # it was renamed or removed between `open` and `flock`: what we locked is no longer it


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False
