"""One job at a time behind the caller's back: a chunk is written while the next is computed."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """Does one job at a time in a thread, while the caller prepares the next; reports what each returns."""

    def __init__(self, report: Callable[[int], None]) -> None:
        """Call `report`, in the caller's thread, with what each job returned."""
        self._report, self._executor = report, ThreadPoolExecutor(1, thread_name_prefix="lut-writer")
        self._job: Future[int] | None = None

    def submit(self, job: Callable[[], int]) -> None:
        """Wait for the job before, then start this one; raises what the one before raised."""
        self.wait()
        self._job = self._executor.submit(job)

    def wait(self) -> None:
        """Wait for the job that is under way, if any."""
        if self._job is not None:
            job, self._job = self._job, None
            self._report(job.result())

    def __enter__(self) -> "Background":
        """Return the object itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let the last job end, whatever happened."""
        self._executor.shutdown()
