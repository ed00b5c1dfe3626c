"""The final report of a run: JSON for programs, a table for people."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from src.evaluation.perplexity import Score
from src.files import write_text


@dataclass(frozen=True, kw_only=True)
class TableFacts:
    """What the written table takes."""

    directory: str
    precision: str
    table_bytes: int
    bytes_per_token: int


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run did, by the numbers."""

    steps: int
    trained_tokens: int
    initial: Score | None
    """Held-out score before the first step."""
    training_form: Score
    lookup_form: Score | None
    zlib_bits_per_byte: float
    """What `zlib -9` makes of the same held-out text."""
    table: TableFacts | None
    training_form_bytes: int
    """Weights in memory, experts included."""
    lookup_form_bytes: int | None
    """Weights in memory when the experts are a table on disk."""
    sample: str | None

    @property
    def difference(self) -> float | None:
        """Held-out loss of the lookup form minus that of the training form, in nats."""
        return None if self.lookup_form is None else self.lookup_form.loss - self.training_form.loss

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        values = asdict(self)
        for name in ("initial", "training_form", "lookup_form"):
            score: Score | None = getattr(self, name)
            values[name] = None if score is None else score.to_dict()
        return {**values, "difference": self.difference}

    def metrics(self) -> dict[str, float]:
        """Return the figures that belong in a tracker."""
        metrics = {f"final/training_form/{name}": value for name, value in self.training_form.to_dict().items()}
        if self.lookup_form is not None and self.difference is not None:
            metrics |= {f"final/lookup_form/{name}": value for name, value in self.lookup_form.to_dict().items()}
            metrics["final/difference"] = self.difference
        if self.table is not None:
            metrics |= {"lut/bytes": self.table.table_bytes, "lut/bytes_per_token": self.table.bytes_per_token}
        return metrics


def update_report(path: Path, values: Mapping[str, Any]) -> None:
    """Merge `values` into the JSON report at `path`, whole or not at all."""
    present = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_text(path, json.dumps({**present, **values}, indent=1) + "\n")


def print_report(report: Report, console: Console, run: Path) -> None:
    """Print what a newcomer wants to know: did it learn, are both forms the same, what does each cost, what next."""
    console.rule(f"[bold]{run}")
    console.print(f"trained {report.steps:,} steps on {report.trained_tokens:,} tokens\n")
    console.print(_scores_table(report))
    if report.difference is not None:
        console.print(f"lookup form minus training form: {report.difference:+.2e} nats per token\n")
    console.print(_memory_table(report))
    if report.sample is not None:
        console.print("a sample from the trained model:", style="bold")
        console.print(report.sample, markup=False, highlight=False, style="dim")
    console.print("\nnext:", style="bold")
    console.print(f'  python -m src.generate --run {run} --prompt "import os"', markup=False, highlight=False)
    if report.lookup_form is not None:
        console.print(f"  python -m src.verify --run {run}", markup=False, highlight=False)


def _scores_table(report: Report) -> Table:
    table = Table(title="held-out text", title_justify="left")
    for heading in ("", "loss (nats/token)", "perplexity", "bits per byte"):
        table.add_column(heading, justify="left" if not heading else "right")
    rows = [
        ("before training", report.initial),
        ("training form (experts computed)", report.training_form),
        ("lookup form (rows read from disk)", report.lookup_form),
    ]
    for name, score in rows:
        if score is not None:
            table.add_row(name, f"{score.loss:.4f}", f"{score.perplexity:,.1f}", f"{score.bits_per_byte:.3f}")
    table.add_row("zlib -9, for comparison", "", "", f"{report.zlib_bits_per_byte:.3f}")
    return table


def _memory_table(report: Report) -> Table:
    table = Table(title="what each form takes", title_justify="left")
    for heading in ("", "weights in memory", "on disk", "read per token"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("training form", mebibytes(report.training_form_bytes), "", "")
    if report.table is not None and report.lookup_form_bytes is not None:
        table.add_row(
            f"lookup form ({report.table.precision})",
            mebibytes(report.lookup_form_bytes),
            mebibytes(report.table.table_bytes),
            f"{report.table.bytes_per_token / 1024:,.1f} KiB",
        )
    return table


def mebibytes(count: int) -> str:
    """Format a number of bytes."""
    return f"{count / 2**20:,.1f} MiB"
