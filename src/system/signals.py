"""SIGTERM and SIGUSR1 as an exception, raised at once or, while steps are held together, between two of them.

Python runs signal handlers in the main thread, between two bytecodes, so C code that takes long delays the exception.
A second thread, which the signal wakes even then, therefore ends the process if the exception has not done so in time.
Knows nothing of training.
"""

import os
import signal
import threading
from collections.abc import Sequence
from subprocess import Popen
from types import FrameType
from typing import Any, NoReturn

from src.system.ranks import is_rank_zero, leave

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))  # Windows
UNWIND_SECONDS = 7.0
"""Time that `finally` clauses and context managers get to clean up before the process ends anyway."""
RANK_UNWIND_SECONDS = 1.0
"""The same on ranks above 0, which leave nothing behind."""


class Preempted(BaseException):
    """A stop signal; like KeyboardInterrupt no Exception, so that no handler of errors takes it for one."""

    def __init__(self, signum: int, step: int | None = None) -> None:
        """Say which signal came and, when training was stopped between two steps, the last step in a checkpoint."""
        where = "" if step is None else f" after step {step}, which is in the last checkpoint"
        super().__init__(f"{signal.Signals(signum).name}: stopped{where}; --resume the run to do the rest")
        self.signum, self.step = signum, step

    @property
    def exit_code(self) -> int:
        """What a shell reports for a process that the signal ended."""
        return 128 + self.signum


def leave_on_stop_signals() -> None:
    """Let a stop signal end this process at once, for code that has nothing to clean up."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, lambda received, _: leave(exit_code(received)))


def exit_code(signum: int) -> int:
    """128 + signal, but 0 on ranks above 0: a launcher ends rank 0 when another rank fails."""
    return 128 + signum if is_rank_zero() else 0


class StopSignals:
    """Raises `Preempted` in the main thread for the first stop signal, once `listen` was called.

    Between `hold` and `release` a signal is only remembered, in `received`; the holder then calls `stop`.
    """

    def __init__(self) -> None:
        self.received = 0
        self.children: Sequence[Popen[bytes]] = ()
        """Ranks that this process started, which a signal ends too."""
        self._held = False
        self._process = 0
        self._earlier: dict[int, Any] = {}
        self._earlier_wakeup = -1
        self._wakeup = -1
        self._deadline: threading.Timer | None = None

    def __reduce__(self) -> tuple[type["StopSignals"], tuple[()]]:
        """Copies in other processes listen for themselves."""
        return StopSignals, ()

    def listen(self) -> None:
        """Handle the signals of this process, again if others have taken them over; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            return
        if self._process != os.getpid():
            self._process = os.getpid()
            self._earlier = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
            read, self._wakeup = os.pipe()
            os.set_blocking(self._wakeup, False)
            self._earlier_wakeup = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(read,), daemon=True, name="stop-signals").start()
        for signum in STOP_SIGNALS:
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

    def stop(self, signum: int, step: int | None = None) -> NoReturn:
        """Raise `Preempted` for a signal that this process or another rank received."""
        self.received, self._held = signum, True
        self._end_in_time(signum)
        raise Preempted(signum, step)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received or os.getpid() != self._process:  # forked data-loader workers inherit the handler
            return
        self.received = signum
        if not self._held:
            self.stop(signum)

    def _watch(self, read: int) -> None:
        """Learn of signals from the kernel, while the main thread may be inside C code."""
        with os.fdopen(read, "rb", buffering=0) as signals:
            while received := signals.read(1):
                if received[0] in STOP_SIGNALS and not self._held:
                    self._end_in_time(received[0])

    def _end_in_time(self, signum: int) -> None:
        if self._deadline is None:
            seconds = UNWIND_SECONDS if is_rank_zero() else RANK_UNWIND_SECONDS
            self._deadline = threading.Timer(seconds, os._exit, [exit_code(signum)])
            self._deadline.daemon = True
            self._deadline.start()
            for child in self.children:  # this thread may wait for them in a collective operation
                child.send_signal(signal.SIGTERM)
