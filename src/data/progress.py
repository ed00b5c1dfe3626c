"""How far preparing a corpus has come: rate and time left. Knows nothing of what is being done."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


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
