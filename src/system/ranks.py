"""Per-rank process handling: which rank logs, and shutting ranks down together. Knows nothing of what they compute.

A rank in a collective operation waits for a lost one without end, or fails with an error that is not the cause. So a
rank that fails prints the cause, exactly once, and ends the others.
"""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from subprocess import Popen

from src.errors import UserError

FAILED = 1
_WATCH_SECONDS = 1.0


class ReportedFailureError(Exception):
    """The run failed, and the cause has been printed."""


def is_rank_zero() -> bool:
    """Whether this process is rank 0 of its run, by the environment variables that launchers set."""
    environment = os.environ
    match launcher()[0]:
        case "torchrun":
            return environment["RANK"] == "0"
        case "srun":
            return environment.get("SLURM_PROCID", "0") == "0"
        case _:  # Lightning, or a person on each machine
            return environment.get("LOCAL_RANK", "0") == environment.get("NODE_RANK", "0") == "0"


def launcher() -> tuple[str, int]:
    """Return what started the ranks of this run and how many, by its environment variables; ("", 1) if nothing did.

    A batch script or an interactive shell of SLURM is one process, however many tasks its job has: only `srun` starts
    ranks. What MPI's own launchers set comes first, since they start ranks inside jobs of SLURM.
    """
    environment = os.environ
    if "RANK" in environment:
        return "torchrun", _count("WORLD_SIZE")
    for name, variable in (("mpirun", "OMPI_COMM_WORLD_SIZE"), ("jsrun", "JSM_NAMESPACE_SIZE")):
        if _count(variable) > 1:
            return name, _count(variable)
    is_step = "SLURM_STEP_ID" in environment or environment.get("SLURM_PROCID", "0") != "0"
    tasks = _count("SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS")
    if tasks > 1 and (is_step or "SLURM_STEP_NUM_TASKS" in environment):
        return "srun", tasks
    return ("mpirun", _count("PMI_SIZE")) if _count("PMI_SIZE") > 1 else ("", 1)


def _count(variable: str) -> int:
    value = os.environ.get(variable, "")
    return int(value) if value.isdecimal() else 1


def ranks_started_together() -> int:
    """Return how many processes torchrun or srun started for this run; 1 without them."""
    found = (os.environ.get(name, "") for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))
    return max(int(value) if value.isdecimal() else 1 for value in found)


def report_once(record: Path, text: str) -> bool:
    """Print `text` to stderr unless another rank has reported the failure; return whether it was printed.

    The first rank to fail creates `record`, so a rank that fails as a consequence finds it.
    """
    try:
        with record.open("x", encoding="utf-8") as handle:
            handle.write(text + "\n")
    except FileExistsError:
        return False
    except OSError:  # a full or lost disk must not hide the cause
        pass
    print(text, file=sys.stderr, flush=True)
    return True


def describe_failure(error: BaseException, rank: int) -> str:
    """Return the message of a user's mistake, or the traceback of any other error."""
    if isinstance(error, UserError):
        return f"error: {error}"
    return f"rank {rank} failed:\n{''.join(traceback.format_exception(error)).rstrip()}"


def describe_lost(children: Sequence[Popen[bytes]]) -> str | None:
    """Describe which of the processes that rank 0 started was killed; None if none was."""
    for rank, child in enumerate(children, start=1):
        if (code := child.poll()) is not None and code < 0:
            return f"rank {rank} (process {child.pid}) was killed by {signal.Signals(-code).name}; out of memory?"
    return None


def leave(exit_code: int) -> None:
    """End this process without the cleanup that waits for other ranks."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, RuntimeError):  # a signal handler may run in the middle of a write
            stream.flush()
    os._exit(exit_code)


class ParentWatch(threading.Thread):
    """Ends this process when its parent process is gone, even while it waits for other ranks."""

    def __init__(self, record: Path) -> None:
        """Watch the present parent; `record` as in `report_once`."""
        super().__init__(daemon=True, name="parent-watch")
        self._parent, self._record, self._done = os.getppid(), record, threading.Event()

    def run(self) -> None:
        while not self.lost():
            if self._done.wait(_WATCH_SECONDS):
                return
        report_once(self._record, self.reason())
        leave(FAILED)

    def stop(self) -> None:
        """Stop watching, so that the parent may end first."""
        self._done.set()

    def lost(self) -> bool:
        return os.getppid() != self._parent

    def reason(self) -> str:
        return f"the process that started this rank (process {self._parent}) was killed; out of memory?"
