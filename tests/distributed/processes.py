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


def start_ranks(target: Callable[[], object], logs: Path, machines: int = 1) -> list[BaseProcess]:
    """Run `target` as every rank of a group of two on each machine; rank r writes to `logs`/rank-r.log."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    logs.mkdir(parents=True, exist_ok=True)
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(2 * machines)}
    places = [(node, local) for node in range(machines) for local in range(2)]
    return [
        start(target, logs / f"rank-{rank}.log", NODE_RANK=str(node), LOCAL_RANK=str(local), **group)
        for rank, (node, local) in enumerate(places)
    ]


def wait(processes: list[BaseProcess], seconds: float = 180) -> list[int]:
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


def run_ranks(target: Callable[[], object], logs: Path, machines: int = 1) -> None:
    """Run `target` on two ranks of each machine, which must all end well."""
    codes = wait(start_ranks(target, logs, machines))
    assert not any(codes), "".join(path.read_text() for path in sorted(logs.glob("rank-*.log")))
