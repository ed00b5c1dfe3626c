"""Progress bars on stderr. Knows nothing of the work that they show."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from src.system.ranks import is_rank_zero


def stderr_console() -> Console:
    """A console for everything that is not the verb's result; silent on ranks above 0."""
    return Console(stderr=True, quiet=not is_rank_zero())


@contextmanager
def progress_bar(description: str, total: int) -> Generator[Callable[[int], None]]:
    """Show a bar on stderr and yield a function that advances it."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr_console()) as progress:
        task = progress.add_task(description, total=total)
        yield lambda count: progress.advance(task, count)


class Reading(NamedTuple):
    """Progress through one source."""

    label: str
    done: int
    total: int | None
    """None where nobody knows, as in some streams."""
    unit: str
    """bytes (as stored, so of compressed files less than of their text), rows or steps."""


Report = Callable[[Reading], None]
"""Called as work goes on."""


def no_report(reading: Reading) -> None:
    """Show nothing."""


@contextmanager
def progress_report(console: Console) -> Generator[Report]:
    """Show one bar per source on `console`, with rate and time left."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        _Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, refresh_per_second=2) as progress:
        tasks = {}

        def report(reading: Reading) -> None:
            if reading.label not in tasks:  # what was done before does not count for the rate
                tasks[reading.label] = progress.add_task(
                    reading.label, total=reading.total, completed=reading.done, unit=reading.unit
                )
            progress.update(tasks[reading.label], completed=reading.done)

        yield report


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        if not (speed := task.finished_speed or task.speed):
            return Text("")
        rates = {"bytes": f"{speed / 1e6:.1f} MB/s", "rows": f"{speed:,.0f} rows/s"}
        return Text(rates.get(task.fields["unit"], ""))
