"""A disk that fails at a chosen moment, for this process and for good: the kernel refuses its system calls.

A seccomp filter answers them, so writes of torch and safetensors fail like those of Python, also for root. Standard
streams stay writable. What comes before is counted by an audit hook. Neither can be undone: call it in a child process.
"""

import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

_NUMBERS = {
    "x86_64": {
        "write": (1, 18, 20, 296, 328),  # write, pwrite64, writev, pwritev, pwritev2
        "open": (257, 2),  # openat, open
        "change": (82, 83, 87, 88, 258, 263, 264, 265, 266, 316),  # rename, mkdir, unlink, symlink, ...at, renameat2
    },
    "aarch64": {"write": (64, 68, 66, 70, 287), "open": (56,), "change": (34, 35, 36, 37, 38, 276)},
}
_LOAD, _EQUAL, _GREATER, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_ALLOW, _ERRNO, _FIRST_ARGUMENT = 0x7FFF0000, 0x00050000, 16
_FLAGS = {257: 2, 2: 1, 56: 2}
"""The argument of each way to open a file that says whether it is for writing."""
_SECCOMP = {"x86_64": 317, "aarch64": 277}

needs_seccomp = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in _NUMBERS, reason="system calls can be refused on Linux only"
)


def fail_from_now_on(code: int) -> None:
    """Let this process write nothing more: `code` is ENOSPC for a full disk, EROFS for one that became read-only."""
    numbers, rules = _NUMBERS[platform.machine()], []
    refuse = (_RETURN, 0, 0, _ERRNO | code)
    for number in numbers["write"]:  # beyond the standard streams
        rules += [(_EQUAL, 0, 3, number), (_LOAD, 0, 0, _FIRST_ARGUMENT), (_GREATER, 0, 1, 2), refuse]
        rules.append((_LOAD, 0, 0, 0))
    if code != errno.ENOSPC:
        for number in numbers["change"]:
            rules += [(_EQUAL, 0, 1, number), refuse]
        for number in numbers["open"]:
            flags = _FIRST_ARGUMENT + 8 * _FLAGS[number]
            writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
            rules += [(_EQUAL, 0, 3, number), (_LOAD, 0, 0, flags), (_ANY_BIT, 0, 1, writes), refuse]
            rules.append((_LOAD, 0, 0, 0))
    rules = [(_LOAD, 0, 0, 0), *rules, (_RETURN, 0, 0, _ALLOW)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    filters = struct.pack("HxxxxxxP", len(rules), ctypes.addressof(program))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    every_thread = 1
    assert libc.syscall(_SECCOMP[platform.machine()], 1, every_thread, filters) == 0, os.strerror(ctypes.get_errno())


def at_write(number: int, place: Path, name: str, act: Callable[[], None]) -> Callable[[], int]:
    """Call `act` ahead of the `number`-th time that a file under `place` with `name` in its name is written or renamed.

    Return a function that counts how often that was.
    """
    count, prefix = 0, str(place)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event == "open":
            path, mode, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            writes = writes or (isinstance(mode, str) and any(letter in mode for letter in "wax+"))
        elif event in ("os.rename", "os.mkdir", "os.symlink", "os.link"):
            path, writes = arguments[0 if event == "os.mkdir" else 1], True
        else:
            return
        if writes and isinstance(path, str | os.PathLike) and str(path).startswith(prefix) and name in str(path):
            count += 1
            if count == number:
                act()

    sys.addaudithook(hook)
    return lambda: count
