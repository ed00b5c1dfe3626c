"""Evaluations as tables, and two of them compared document by document."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from src.evaluation.equivalence import NEAR_TIE
from src.evaluation.results import Evaluation, PairedDifference, TaskScore, TextScore, paired_difference
from src.system.console import text_table


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One metric of one text or task, the second evaluation minus the first."""

    name: str
    metric: str
    paired: PairedDifference
    changed_predictions: int | None = None
    """Documents that are answered differently; None where nothing is predicted."""
    near_ties: int | None = None
    """How many of those were decided by less than `NEAR_TIE`, where rounding alone may change the answer."""

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        values |= values.pop("paired")
        return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in values.items()}


def compare(first: Evaluation, second: Evaluation) -> list[Comparison]:
    """Pair the scores of windows and documents that both evaluations have; leave out the rest."""
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
            changed_predictions=len(gaps) if first.predictions else None,
            near_ties=sum(gap < NEAR_TIE for gap in gaps) if first.predictions else None,
        )


def print_comparison(rows: list[Comparison], first: str, second: str, console: Console) -> None:
    """Print a table of differences, their standard errors and paired tests."""
    title = f"{second} minus {first}, paired by document"
    table = text_table(title, "", "first", "second", "difference", "std.\nerror", "p", "changed")
    for row in rows:
        paired = row.paired
        changed = "" if row.changed_predictions is None else f"{row.changed_predictions}/{paired.documents}"
        if row.near_ties:
            changed += f" ({row.near_ties})"
        table.add_row(
            f"{row.name} {row.metric.replace('log_likelihood', 'log-lik.')}",
            f"{paired.first:#.5g}",
            f"{paired.second:#.5g}",
            f"{paired.difference:+.1e}",
            "" if math.isnan(paired.stderr) else f"{paired.stderr:.1e}",
            f"{paired.p_value:.1g}",
            changed,
        )
    console.print(table)
    console.print("p: exact McNemar test where answers are right or wrong, else paired t test", style="dim")
    console.print("changed: documents answered differently (of them near-ties)\n", style="dim")


def print_evaluation(evaluation: Evaluation, name: str, console: Console) -> None:
    """Print the scores of one model: texts, tasks, and loss by how often the predicted id occurs in training."""
    texts = text_table(f"{name}: text", "", "nats/token", "std. error", "perplexity", "bits/byte", "tokens")
    for text in evaluation.texts:
        score, stderr = text.score, _four_digits(text.stderr)
        figures = f"{score.perplexity:,.2f}", f"{score.bits_per_byte:.4f}", f"{score.tokens:,}"
        texts.add_row(text.corpus, f"{score.loss:.4f}", stderr, *figures)
    console.print(texts)
    if evaluation.tasks:
        console.print(_tasks_table(evaluation.tasks, name))
    console.print(_bands_table(evaluation.texts, name))


def _four_digits(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def _tasks_table(tasks: list[TaskScore], name: str) -> Table:
    headings = ("", "metric", "score", "std. error", "documents")
    table = text_table(f"{name}: tasks", *headings, texts=headings[:2])
    for task in tasks:
        shots = task.about.get("num_fewshot")
        label = f"{task.task}, {shots}-shot" if shots else task.task
        for metric, (score, stderr) in task.figures().items():
            table.add_row(label, metric, f"{score:.4f}", _four_digits(stderr), f"{task.num_documents:,}")
    return table


def _bands_table(texts: list[TextScore], name: str) -> Table:
    title = f"{name}: loss by occurrences of the predicted id in training"
    table = text_table(title, "", "occurrences", "nats/token", "tokens", texts=("",))
    for text in texts:
        for band in text.bands:
            table.add_row(text.corpus, band.name, f"{band.loss:.4f}", f"{band.tokens:,}")
        table.add_section()
    return table
