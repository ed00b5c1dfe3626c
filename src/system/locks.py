"""Locks on files, which the kernel releases when their process ends.

Some file systems have none (NFS without a lock service, Lustre mounted without `flock`), nor has Windows. One process
works there without them, after a note.
"""

import errno
import os
from functools import cache
from pathlib import Path

from src.system.console import print_note

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


def lock(descriptor: int, *, shared: bool = False, wait: bool = False) -> bool:
    """Lock an open file until it is closed, alone or shared; return whether there are locks here.

    Raises BlockingIOError if another process holds it and `wait` is off.
    """
    try:
        import fcntl  # Windows has none

        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except ImportError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


@cache
def note_missing_locks() -> None:
    """Say once that nothing keeps two processes apart."""
    print_note(
        "the file system has no file locks (flock), so nothing keeps two commands apart that prepare one corpus or "
        "build one table; run one of them at a time"
    )


def open_locked(path: Path, *, shared: bool = False) -> int:
    """Open (or create) a file, lock it, and return its descriptor; closing it unlocks.

    Raises BlockingIOError if another process holds it.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
        try:
            if not lock(descriptor, shared=shared):
                note_missing_locks()
            if _is_still(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the file was renamed or removed between `open` and the lock; lock its successor


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False
