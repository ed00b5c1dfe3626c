"""Encodes batches of documents in several processes, in order and in bounded memory. Knows no files and no splits.

A tokenizing process runs `src.data.encoder.serve`. It is not started by `multiprocessing`, which would import the
caller's main module, with torch and all, in each of them.
"""

import itertools
import os
import queue
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

from src.data.encoder import Encoded, Encoder
from src.data.text_rule import TextRule
from src.errors import DataError

Batch = TypeVar("Batch")
_PROJECT = Path(__file__).parent.parent.parent


def encode_in_order(
    batches: Iterable[Batch],
    texts_of: Callable[[Batch], list[str]],
    rule: TextRule,
    processes: int,
) -> Iterator[tuple[Batch, Encoded]]:
    """Yield each batch with its ids, in the order of `batches`, holding at most 2 batches per process.

    Args:
        batches: what to encode; a single batch is encoded in this process.
        texts_of: returns a batch's documents.
        rule: encodes them.
        processes: tokenizing processes.

    Raises:
        DataError: a tokenizing process died.
    """
    remaining = iter(batches)
    first = list(itertools.islice(remaining, 2))
    if len(first) < 2:
        encoder = Encoder(rule)
        yield from ((batch, encoder(texts_of(batch))) for batch in first)
        return
    with _encoding_processes(rule, processes) as encode:
        pending: deque[tuple[Batch, Future[Encoded]]] = deque()
        for batch in itertools.chain(first, remaining):
            pending.append((batch, encode(texts_of(batch))))
            if len(pending) >= 2 * processes:
                batch, future = pending.popleft()
                yield batch, future.result()
        while pending:
            batch, future = pending.popleft()
            yield batch, future.result()


@contextmanager
def _encoding_processes(rule: TextRule, processes: int) -> Generator[Callable[[list[str]], "Future[Encoded]"]]:
    """Start tokenizing processes, each with a thread that feeds it, and yield a function that takes a batch."""
    idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()

    def encode(texts: list[str]) -> Encoded:
        process = idle.get()
        try:
            return process.encode(texts)
        finally:
            idle.put(process)

    with ExitStack() as stack:
        for _ in range(processes):
            idle.put(stack.enter_context(_Process(rule)))
        threads = ThreadPoolExecutor(processes)
        stack.callback(threads.shutdown, cancel_futures=True)
        yield lambda texts: threads.submit(encode, texts)


class _Process:
    """A tokenizing process; it ends when its socket is closed, so also when this process is killed."""

    def __init__(self, rule: TextRule) -> None:
        ours, theirs = socket.socketpair()
        path = os.pathsep.join(filter(None, (str(_PROJECT), os.environ.get("PYTHONPATH"))))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from src.data.encoder import serve; serve({theirs.fileno()})"],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
                start_new_session=True,  # Ctrl-C is ours to handle
            )
        self._connection = Connection(ours.detach())
        self._connection.send(rule)

    def encode(self, texts: list[str]) -> Encoded:
        try:
            self._connection.send(texts)
            return self._connection.recv()
        except (EOFError, OSError) as error:
            raise DataError(
                f"a tokenizing process ended with exit code {self._process.wait()}; was it killed, or out of memory? "
                "Run again to continue, with a lower data.prepare_processes if memory is short"
            ) from error

    def __enter__(self) -> "_Process":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.wait()
