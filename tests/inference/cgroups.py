"""Runs a program inside a memory cgroup of its own, where this system lets us make one."""

import os
import subprocess
import sys
import uuid
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path("/sys/fs/cgroup")
_ENTER = (
    "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
)


class MemoryCgroup:
    """A child of this process's own cgroup; version 1 or 2."""

    def __init__(self, path: Path, *, version: int) -> None:
        self.path = path
        self._limit = path / ("memory.max" if version == 2 else "memory.limit_in_bytes")
        self._peak = path / ("memory.peak" if version == 2 else "memory.max_usage_in_bytes")

    def limit(self, num_bytes: int) -> None:
        self._limit.write_text(str(num_bytes))

    def peak(self) -> int:
        return int(self._peak.read_text())

    def run(self, arguments: Sequence[str]) -> "subprocess.CompletedProcess[str]":
        """Run Python with `arguments` inside; the process enters before it loads anything."""
        command = [sys.executable, "-c", _ENTER, str(self.path / "cgroup.procs"), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@contextmanager
def memory_cgroup() -> Generator[MemoryCgroup]:
    """Make a memory cgroup and remove it; skips the test where that is not allowed."""
    place, version = _own_cgroup()
    path = place / f"mole-test-{uuid.uuid4().hex[:8]}"
    try:
        path.mkdir()
    except OSError as error:
        pytest.skip(f"memory cgroups cannot be made here: {error}")
    cgroup = MemoryCgroup(path, version=version)
    try:
        if not cgroup._peak.exists() or not cgroup._limit.exists():
            pytest.skip("this cgroup does not control memory, or does not tell its peak")
        yield cgroup
    finally:
        path.rmdir()


def _own_cgroup() -> tuple[Path, int]:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        pytest.skip("this system has no cgroups")
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return ROOT / "memory" / path.lstrip("/"), 1
    return ROOT / next((line[3:] for line in lines if line.startswith("0::")), "/").lstrip("/"), 2
