"""Two evaluations side by side, document by document."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from src.evaluation.equivalence import NEAR_TIE
from src.evaluation.perplexity import Band
from src.evaluation.results import Evaluation, PairedDifference, TaskScore, TextScore, paired_difference


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One metric of one text or task, the second evaluation minus the first."""

    name: str
    metric: str
    paired: PairedDifference
    changed_predictions: int | None = None
    """Documents that are answered differently; None where nothing is predicted."""
    near_ties: int | None = None
    """How many of those were decided by less than `NEAR_TIE`, where rounding alone may turn them."""

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        values = {**asdict(self), **self.paired.to_dict()}
        del values["paired"]
        return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in values.items()}


def compare(first: Evaluation, second: Evaluation) -> list[Comparison]:
    """Pair what both evaluations scored on the same windows and documents; the rest is left out."""
    rows: list[Comparison] = []
    texts = {(text.corpus, text.fingerprint): text for text in second.texts}
    for text in first.texts:
        if (other := texts.get((text.corpus, text.fingerprint))) is not None:
            paired = paired_difference(text.window_losses, other.window_losses)
            rows.append(Comparison(name=text.corpus, metric="loss", paired=paired))
    tasks = {(task.task, task.fingerprint): task for task in second.tasks}
    for task in first.tasks:
        if (other := tasks.get((task.task, task.fingerprint))) is not None:
            rows.extend(_compare_task(task, other))
    return rows


def _compare_task(first: TaskScore, second: TaskScore) -> Iterator[Comparison]:
    answers = zip(first.predictions, second.predictions, first.gaps, strict=True)
    gaps = [gap for before, after, gap in answers if before != after]
    for metric, values in first.values.items():
        yield Comparison(
            name=first.task,
            metric=metric,
            paired=paired_difference(values, second.values[metric]),
            changed_predictions=len(gaps),
            near_ties=sum(gap < NEAR_TIE for gap in gaps),
        )


def print_comparison(rows: list[Comparison], first: str, second: str, console: Console) -> None:
    """Print a table of differences, their standard errors and paired tests."""
    table = Table(title=f"{second} minus {first}, paired by document", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("", "first", "second", "difference", "std. error", "p", "changed"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=bool(heading))
    for row in rows:
        paired = row.paired
        changed = "" if row.changed_predictions is None else f"{row.changed_predictions}/{paired.documents}"
        if row.near_ties:
            changed += f" ({row.near_ties} near-ties)"
        table.add_row(
            f"{row.name} {row.metric.replace('log_likelihood', 'log-lik.')}",
            f"{paired.first:.4f}",
            f"{paired.second:.4f}",
            f"{paired.difference:+.1e}",
            "" if math.isnan(paired.stderr) else f"{paired.stderr:.1e}",
            f"{paired.p_value:.2g}",
            changed,
        )
    console.print(table)
    console.print("p: exact McNemar test where answers are right or wrong, else paired t test\n", style="dim")


def print_evaluation(evaluation: Evaluation, name: str, console: Console) -> None:
    """Print what one model scored: texts, tasks, and the loss by how often an id occurs in the training text."""
    texts = Table(title=f"{name}: text", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("", "nats/token", "std. error", "perplexity", "bits per byte", "tokens"):
        texts.add_column(heading, justify="right" if heading else "left")
    for text in evaluation.texts:
        texts.add_row(text.corpus, *_text_cells(text))
    console.print(texts)
    if evaluation.tasks:
        console.print(_tasks_table(evaluation.tasks, name))
    console.print(_bands_table(evaluation.texts, name))


def _text_cells(text: TextScore) -> list[str]:
    score = text.score
    stderr = "" if math.isnan(text.stderr) else f"{text.stderr:.4f}"
    return [
        f"{score.loss:.4f}",
        stderr,
        f"{score.perplexity:,.2f}",
        f"{score.bits_per_byte:.4f}",
        f"{score.tokens:,}",
    ]


def _tasks_table(tasks: list[TaskScore], name: str) -> Table:
    table = Table(title=f"{name}: tasks", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("", "metric", "score", "std. error", "documents"):
        table.add_column(heading, justify="left" if heading in ("", "metric") else "right")
    for task in tasks:
        scores = task.metrics()
        for metric in task.values:
            stderr = scores[f"{task.task}/{metric}_stderr"]
            cells = f"{task.mean(metric):.4f}", "" if math.isnan(stderr) else f"{stderr:.4f}"
            table.add_row(task.task, metric, *cells, f"{len(task.predictions):,}")
    return table


def _bands_table(texts: list[TextScore], name: str) -> Table:
    title = f"{name}: loss by occurrences of the predicted id in training"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("occurrences")
    counts = sorted({(band.least, band.name) for text in texts for band in text.bands})
    for text in texts:
        table.add_column(text.corpus, justify="right")
    for _, occurrences in counts:
        found = ({band.name: band for band in text.bands}.get(occurrences) for text in texts)
        table.add_row(occurrences, *(_band_cell(band) for band in found))
    return table


def _band_cell(band: Band | None) -> str:
    return "" if band is None else f"{band.loss:.3f} ({band.tokens:,} tokens)"
