"""Threads for reads that block, and work that they share with whoever waits for it."""

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from src.errors import LutError

Item = TypeVar("Item")


def after_fork_in_child(reset: Callable[[], None]) -> None:
    """Call the bound method `reset` in every forked child, as long as its object lives.

    Threads do not survive a fork and a lock that another thread held stays held for ever.
    """
    method = weakref.WeakMethod(reset)

    def call() -> None:
        if (alive := method()) is not None:
            alive()

    os.register_at_fork(after_in_child=call)


class SharedWork(Generic[Item]):
    """Items that several threads take from one iterator, so that none of them idles while another has a queue."""

    def __init__(self, perform: Callable[[Item], None], items: Sequence[Item]) -> None:
        """Nothing runs until a thread calls `take`."""
        self._perform, self._all, self._process = perform, items, os.getpid()
        self._left = iter(items)  # `next` on it is atomic
        self._helpers: list[Future[None]] = []

    def help_with(self, helpers: list["Future[None]"]) -> None:
        """Remember the helpers that were hired for this work."""
        self._helpers = helpers

    def take(self) -> None:
        """Perform items until none is left."""
        for item in self._left:
            self._perform(item)

    def finish(self) -> None:
        """Do what is left, then wait for items that others still have in hand; raises what any of them raised."""
        if os.getpid() != self._process:  # started before a fork: what helpers had in hand never arrives here
            self._left, self._helpers = iter(self._all), []
        self.take()
        for helper in self._helpers:
            if not helper.cancel():  # one that never ran has nothing in hand
                helper.result()


class WorkerPool:
    """Up to `depth` threads, started on first use and anew in a forked child."""

    def __init__(self, depth: int) -> None:
        """Start no thread yet."""
        self.depth = depth
        self._closed = False
        self._reset()
        after_fork_in_child(self._reset)

    def _reset(self) -> None:
        self._lock, self._executor = threading.Lock(), None

    def start(self, perform: Callable[[Item], None], items: Sequence[Item], *, background: bool) -> SharedWork[Item]:
        """Begin to `perform` items in parallel; without `background` the caller is one of the workers."""
        work = SharedWork(perform, items)
        helpers = min(self.depth, len(items)) - (not background)
        if helpers > 0:
            executor = self._running()
            work.help_with([executor.submit(work.take) for _ in range(helpers)])
        return work

    def _running(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._closed:
                raise LutError("the table is closed; open it again to read")
            if self._executor is None:
                self._executor = ThreadPoolExecutor(self.depth, thread_name_prefix="lut-read")
            return self._executor

    def close(self) -> None:
        """Stop the threads when they have finished what they have in hand."""
        with self._lock:
            self._closed = True
            if self._executor is not None:
                self._executor.shutdown(cancel_futures=True)
                self._executor = None
