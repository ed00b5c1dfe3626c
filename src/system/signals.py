"""Ctrl-C, SIGTERM and SIGUSR1 as an exception, raised at once or, while steps are held together, between two of them.

Python runs signal handlers in the main thread, between two bytecodes, so C code that takes long delays the exception.
A second thread, which the signal wakes even then, therefore ends the process if the exception has not done so in time,
or if Ctrl-C is pressed again. Knows nothing of training.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from subprocess import Popen
from types import FrameType
from typing import Any, NoReturn

from src.system.ranks import is_rank_zero, leave

STOP_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1")
    if hasattr(signal, name)  # Windows
)
UNWIND_SECONDS = 7.0
"""Time that `finally` clauses and context managers get to clean up before the process ends anyway."""
RANK_UNWIND_SECONDS = 1.0
"""The same on ranks above 0, which leave nothing behind."""

Children = Callable[[], Sequence[Popen[bytes] | BaseProcess]]
"""Returns the processes that a signal ends, too."""


class Preempted(SystemExit):
    """A stop signal: no Exception, so that no handler of errors takes it for one, and no traceback in forked ranks."""

    def __init__(self, signum: int, step: int | None = None) -> None:
        """Say which signal came and, when training was stopped between two steps, the last step in a checkpoint."""
        where = "" if step is None else f" after step {step}, which is in the last checkpoint"
        again = ", or start again if it has no checkpoint" if step is None else ""
        super().__init__(f"{signal.Signals(signum).name}: stopped{where}; --resume the run to do the rest{again}")
        self.signum, self.step = signum, step
        self.code = exit_code(signum)

    @property
    def exit_code(self) -> int:
        """What a shell reports for a process that the signal ended."""
        return 128 + self.signum


def leave_on_stop_signals(signums: Sequence[int] = STOP_SIGNALS) -> None:
    """Let a stop signal end this process at once, for code that has nothing to clean up."""
    for signum in signums:
        signal.signal(signum, lambda received, _: leave(exit_code(received)))


def ignore_stop_signals(_worker: int = 0) -> None:
    """Leave stop signals to the process that started this one: terminals and schedulers send them to both."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def exit_code(signum: int) -> int:
    """128 + signal, but 0 on ranks above 0: a launcher ends rank 0 when another rank fails."""
    return 128 + signum if is_rank_zero() else 0


class StopSignals:
    """Raises `Preempted` in the main thread for the first stop signal, once `listen` was called.

    Between `hold` and `release` a signal is only remembered, in `received`; the holder then calls `stop`. A second
    SIGINT ends the process of a verb at once, and raises KeyboardInterrupt elsewhere, as in a notebook.
    """

    def __init__(self, signums: Sequence[int] = STOP_SIGNALS) -> None:
        self.received = 0
        self.children: Children = tuple
        """Ranks that this process started, which a signal ends too."""
        self._signums = signums
        self._held = self._delegated = False
        self._process = 0
        self._earlier: dict[int, Any] = {}
        self._earlier_wakeup = -1
        self._wakeup = -1
        self._deadline: threading.Timer | None = None

    def __reduce__(self) -> tuple[type["StopSignals"], tuple[()]]:
        """Copies in other processes listen for themselves."""
        return StopSignals, ()

    def listen(self) -> None:
        """Handle the signals of this process, again if others have taken them over; only the main thread can.

        On Windows Python's own handler of Ctrl-C stays.
        """
        if os.name != "posix" or threading.current_thread() is not threading.main_thread():
            return
        if self._process != os.getpid():
            read, wakeup = os.pipe()  # before anything changes: there may be too many open files
            if self._process:  # a forked rank; those of its children that leave signals to it are data-loader workers
                self._delegated, self.children = False, tuple
                Finalize(None, _kill_children, exitpriority=1)
            else:
                self._earlier = {signum: signal.getsignal(signum) for signum in self._signums}
            self._process, self._wakeup = os.getpid(), wakeup
            os.set_blocking(self._wakeup, False)
            self._earlier_wakeup = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(read,), daemon=True, name="stop-signals").start()
        for signum in self._signums:
            signal.signal(signum, self._handle)

    def restore(self) -> None:
        """Hand the signals back to the handlers from before `listen`."""
        if self._process != os.getpid():
            return
        for signum, handler in self._earlier.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self._earlier_wakeup)
        os.close(self._wakeup)
        self._process = 0
        if self._deadline is not None:
            self._deadline.cancel()

    def hold(self) -> None:
        """Only remember a signal from here on."""
        self._held = True

    def release(self) -> None:
        """Let a signal raise at once again; one that was remembered is raised now."""
        self._held = False
        if self.received and self._deadline is None:
            self.stop(self.received)

    def delegate(self, children: Children) -> None:
        """Only pass a signal on, to forked ranks that listen for themselves, and wait for how they end."""
        self._held = self._delegated = True
        self.children = children

    def stop(self, signum: int, step: int | None = None) -> NoReturn:
        """Raise `Preempted` for a signal that this process or another rank received."""
        self.received, self._held = signum, True
        self._end_in_time(signum)
        raise Preempted(signum, step)

    @property
    def owns_process(self) -> bool:
        """Whether Ctrl-C may end this process: it is that of a verb, not a notebook that goes on after it."""
        return self._earlier.get(signal.SIGINT) is not signal.default_int_handler

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # of a forked process, which may be a rank that listens soon
            self.received = self.received or signum
        elif self.received:
            if signum == signal.SIGINT and not self.owns_process:
                raise KeyboardInterrupt
        else:
            self.received = signum
            if self._delegated:
                self._end_children()
            if not self._held:
                self.stop(signum)

    def _watch(self, read: int) -> None:
        """Learn of signals from the kernel, while the main thread may be inside C code."""
        interrupts = 0
        with os.fdopen(read, "rb", buffering=0) as signals:
            while received := signals.read(1):
                signum = received[0]
                if signum not in self._signums or (signum == signal.SIGINT and not self.owns_process):
                    continue
                interrupts += signum == signal.SIGINT
                if interrupts > 1:
                    for child in self.children():
                        child.kill()
                    os._exit(exit_code(signum))
                if not self._held:
                    self._end_in_time(signum)

    def _end_in_time(self, signum: int) -> None:
        if signum == signal.SIGINT and not self.owns_process:
            self._end_children()
        elif self._deadline is None:
            seconds = UNWIND_SECONDS if is_rank_zero() else RANK_UNWIND_SECONDS
            self._deadline = threading.Timer(seconds, os._exit, [exit_code(signum)])
            self._deadline.daemon = True
            self._deadline.start()
            self._end_children()  # the main thread may wait for them in a collective operation

    def _end_children(self) -> None:
        for child in self.children():
            child.terminate()


def _kill_children() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error for a killed worker
    for child in multiprocessing.active_children():
        child.kill()


def _forget_wakeup() -> None:
    """Keep a forked process from writing its signals into the pipe of the process that it was forked from."""
    with suppress(ValueError):  # of a thread other than the main one
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_wakeup)
