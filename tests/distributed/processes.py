"""Processes for tests: ranks and runs forked from the test, which has paid for its imports already."""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

FORK = multiprocessing.get_context("fork")


def start(target: Callable[[], object], log: Path, **environment: str) -> BaseProcess:
    """Run `target` in a forked process with its own environment, stdout and stderr going to `log`."""

    def run() -> None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1)
        os.environ.update(environment)
        target()

    process = FORK.Process(target=run)
    process.start()
    return process


def start_ranks(target: Callable[[], object], logs: Path, world_size: int = 2) -> list[BaseProcess]:
    """Run `target` as every rank of a group, as a launcher would; rank r writes to `logs`/rank-r.log."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    logs.mkdir(parents=True, exist_ok=True)
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size), "NODE_RANK": "0"}
    return [start(target, logs / f"rank-{rank}.log", LOCAL_RANK=str(rank), **group) for rank in range(world_size)]


def wait(processes: list[BaseProcess], seconds: float = 90) -> list[int]:
    """Return the exit codes of processes that must end in time."""
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
    alive = [process for process in processes if process.exitcode is None]
    for process in alive:
        process.kill()
        process.join()
    assert not alive, f"{len(alive)} processes still ran after {seconds} s"
    return [process.exitcode for process in processes if process.exitcode is not None]


def run_ranks(target: Callable[[], object], logs: Path) -> None:
    """Run `target` on two ranks, which must both end well."""
    codes = wait(start_ranks(target, logs))
    assert codes == [0, 0], (logs / "rank-0.log").read_text() + (logs / "rank-1.log").read_text()
