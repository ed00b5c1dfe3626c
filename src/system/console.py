"""Progress, consoles and tables in the terminal. Knows nothing of the work that they show.

rich is imported where it draws: the table and inference take the types from here, and need none of it.
"""

from collections.abc import Callable, Collection, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

from src.system.ranks import is_rank_zero

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import ProgressColumn, Task
    from rich.table import Table
    from rich.text import Text

Advance = Callable[[int], None]
"""Called with how many units of work were just done."""
Progress = Callable[[str, int], AbstractContextManager[Advance]]
"""Opens a progress bar with a description and a total."""


class Reading(NamedTuple):
    """How far one source has been read."""

    label: str
    done: int
    total: int | None
    """None where it is unknown, as in some streams."""
    unit: str
    """bytes (as stored: for compressed files fewer than of text), rows or steps."""


ShowReading = Callable[[Reading], None]
"""Called while sources are read, side by side."""


def no_advance(_count: int) -> None:
    """Show nothing."""


def no_progress(_description: str, _total: int) -> AbstractContextManager[Advance]:
    """Open no bar."""
    return nullcontext(no_advance)


def show_nothing(_reading: Reading) -> None:
    """Show nothing."""


def stderr_console() -> "Console":
    """A console for everything that is not the verb's result; silent on ranks above 0."""
    from rich.console import Console

    return Console(stderr=True, quiet=not is_rank_zero())


def print_note(text: str | None) -> None:
    """Print a remark on stderr, unless there is none."""
    if text is not None:
        stderr_console().print(f"note: {text}", markup=False, highlight=False, soft_wrap=True)


def text_table(title: str, *headings: str, texts: Collection[str] | None = None) -> "Table":
    """Return an empty table of columns of numbers and of `texts` (by default the first), which wrap and fold.

    So names are whole on a narrow console, too.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in headings:
        is_text = heading in (headings[:1] if texts is None else texts)
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold")
    return table


@contextmanager
def progress_bar(description: str, total: int, *, transient: bool = False) -> Generator[Advance]:
    """Show a bar on stderr, which disappears in the end if it is `transient`; yield a function that advances it."""
    from rich.progress import MofNCompleteColumn, Progress

    with Progress(*_columns(MofNCompleteColumn()), console=stderr_console(), transient=transient) as progress:
        task = progress.add_task(description, total=total)
        yield lambda count: progress.advance(task, count)


@contextmanager
def progress_report(console: "Console") -> Generator[ShowReading]:
    """Show one bar per source on `console`, with rate and time left."""
    from rich.progress import Progress, TextColumn

    columns = _columns(TextColumn("{task.percentage:>3.0f}%"), _rate_column())
    with Progress(*columns, console=console, refresh_per_second=2) as progress:
        tasks = {}

        def report(reading: Reading) -> None:
            if reading.label not in tasks:  # what was done before does not count for the rate
                tasks[reading.label] = progress.add_task(
                    reading.label, total=reading.total, completed=reading.done, unit=reading.unit
                )
            progress.update(tasks[reading.label], completed=reading.done)

        yield report


def _columns(*figures: "ProgressColumn") -> "tuple[ProgressColumn, ...]":
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeRemainingColumn

    return SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), *figures, TimeRemainingColumn()


def _rate_column() -> "ProgressColumn":
    from rich.progress import ProgressColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: "Task") -> "Text":
            if not (speed := task.finished_speed or task.speed):
                return Text("")
            rates = {"bytes": f"{speed / 1e6:.1f} MB/s", "rows": f"{speed:,.0f} rows/s"}
            return Text(rates.get(task.fields["unit"], ""))

    return Rate()
