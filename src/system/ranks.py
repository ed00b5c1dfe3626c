"""Ranks as processes: who speaks, and that none outlives another. Knows nothing of what they compute.

Each rank is its own process, so one that fails must tell the reader why, exactly once, and take the others with it:
a rank in a collective waits for a lost one for ever, or fails for a reason that is not the reason.
"""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from subprocess import Popen

from src.errors import UserError

FAILED = 1
_WATCH_SECONDS = 1.0


class ReportedFailureError(Exception):
    """The run failed, and the reader has been told why."""


def is_rank_zero() -> bool:
    """Whether this process is the one that speaks for its run, by what launchers put into the environment."""
    environment = os.environ
    if "RANK" in environment:  # torchrun
        return environment["RANK"] == "0"
    if "LOCAL_RANK" in environment:  # Lightning
        return environment["LOCAL_RANK"] == environment.get("NODE_RANK", "0") == "0"
    if "SLURM_NTASKS" in environment:  # srun
        return environment.get("SLURM_PROCID", "0") == "0"
    return environment.get("NODE_RANK", "0") == "0"


def report_once(record: Path, text: str) -> bool:
    """Print `text` to stderr unless another rank has said why the run fails; return whether it was printed.

    `record` is created by the first to come, so whoever fails only because of another finds it there.
    """
    try:
        with record.open("x", encoding="utf-8") as handle:
            handle.write(text + "\n")
    except FileExistsError:
        return False
    except OSError:  # a full or lost disk must not hide the reason
        pass
    print(text, file=sys.stderr, flush=True)
    return True


def describe_failure(error: BaseException, rank: int) -> str:
    """Return what a reader needs: the message of a user's mistake, the traceback of anything else."""
    if isinstance(error, UserError):
        return f"error: {error}"
    return f"rank {rank} failed:\n{''.join(traceback.format_exception(error)).rstrip()}"


def describe_lost(children: Sequence[Popen[bytes]]) -> str | None:
    """Say which of the processes that rank 0 started was killed; None when none was."""
    for rank, child in enumerate(children, start=1):
        if (code := child.poll()) is not None and code < 0:
            return f"rank {rank} (process {child.pid}) was killed by {signal.Signals(-code).name}; out of memory?"
    return None


def leave(exit_code: int) -> None:
    """End this process without the clean-up that waits for other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


class ParentWatch(threading.Thread):
    """Ends this process when the one that started it is gone, whatever it is waiting for."""

    def __init__(self, record: Path) -> None:
        """Watch the present parent; `record` as in `report_once`."""
        super().__init__(daemon=True, name="parent-watch")
        self._parent, self._record, self._done = os.getppid(), record, threading.Event()

    def run(self) -> None:
        """Look once a second, until there is nothing left to wait for."""
        while not self.lost():
            if self._done.wait(_WATCH_SECONDS):
                return
        report_once(self._record, self.reason())
        leave(FAILED)

    def stop(self) -> None:
        """Let the parent end first."""
        self._done.set()

    def lost(self) -> bool:
        """Whether the parent is gone."""
        return os.getppid() != self._parent

    def reason(self) -> str:
        """Say who is gone."""
        return f"the process that started this rank (process {self._parent}) was killed; out of memory?"
