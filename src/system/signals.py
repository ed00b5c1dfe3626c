"""Signals that ask a run to stop: remembered by their handler, acted on between two steps."""

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(Exception):  # noqa: N818 - nothing went wrong
    """A run stopped because it was told to, with its last finished step in a checkpoint."""

    def __init__(self, signum: int, step: int) -> None:
        """Say which signal came, and the step that the checkpoint holds."""
        super().__init__(f"{signal.Signals(signum).name}: stopped after step {step}, which is in the last checkpoint")
        self.signum, self.step = signum, step

    @property
    def exit_code(self) -> int:
        """What a shell reports for a process that the signal ended."""
        return 128 + self.signum


class StopSignals:
    """Remembers the first of `STOP_SIGNALS` that comes while it listens."""

    def __init__(self) -> None:
        """Listen from `listen` on."""
        self.received: int = 0
        self._earlier: dict[int, signal.Handlers | object] = {}

    def listen(self) -> None:
        """Take over from whoever handles these signals."""
        for signum in STOP_SIGNALS:
            self._earlier[signum] = signal.signal(signum, self._remember)

    def ignore_more(self) -> None:
        """Hand the signals back to who handled them before."""
        for signum, handler in self._earlier.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]
        self._earlier.clear()

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self.received = self.received or signum
