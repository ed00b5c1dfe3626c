"""What a model scored, document by document, so that two of them can be compared in pairs.

N windows or documents.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from src.evaluation.perplexity import Band, Score
from src.evaluation.statistics import standard_error


@dataclass(frozen=True, kw_only=True)
class TextScore:
    """Loss over the windows of one corpus."""

    corpus: str
    score: Score
    window_losses: list[float]
    """(N,) mean nats per token of each window."""
    bands: list[Band]
    fingerprint: str
    """Of the windows: only scores of the same ones can be compared."""

    @property
    def stderr(self) -> float:
        """Standard error of the loss, over windows."""
        return standard_error(self.window_losses)

    def metrics(self) -> dict[str, float]:
        """Return the figures that belong in a tracker."""
        values = {f"{self.corpus}/{name}": value for name, value in self.score.to_dict().items()}
        return {**values, f"{self.corpus}/loss_stderr": self.stderr}

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the losses of each window."""
        bands = [{"counts": band.name, **asdict(band)} for band in self.bands]
        stderr = None if math.isnan(self.stderr) else self.stderr
        return {**self.score.to_dict(), "loss_stderr": stderr, "windows": len(self.window_losses), "bands": bands}


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """One task: what was answered, and how well."""

    task: str
    values: dict[str, list[float]]
    """Per metric (N,): one number per document."""
    predictions: list[int]
    """(N,) the choice with the highest log-likelihood, or 1 where the continuation is the greedy one, else 0."""
    gaps: list[float]
    """(N,) by how much each prediction won: below rounding it may go either way."""
    fingerprint: str
    """Of the documents: only scores of the same ones can be compared."""

    def mean(self, metric: str) -> float:
        """Return the mean of a metric over documents."""
        return math.fsum(self.values[metric]) / len(self.values[metric])

    def metrics(self) -> dict[str, float]:
        """Return the figures that belong in a tracker."""
        means = {f"{self.task}/{metric}": self.mean(metric) for metric in self.values}
        errors = {f"{self.task}/{metric}_stderr": standard_error(values) for metric, values in self.values.items()}
        return means | errors

    def to_dict(self) -> dict[str, Any]:
        """Return every metric's mean and standard error, and the number of documents."""
        values = {name.removeprefix(f"{self.task}/"): value for name, value in self.metrics().items()}
        plain = {name: None if math.isnan(value) else value for name, value in values.items()}
        return {**plain, "documents": len(self.predictions)}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything that one model scored."""

    texts: list[TextScore]
    tasks: list[TaskScore]

    def metrics(self) -> dict[str, float]:
        """Return the figures that belong in a tracker; those of single documents have no standard error."""
        values: dict[str, float] = {}
        for part in (*self.texts, *self.tasks):
            values |= part.metrics()
        return {name: value for name, value in values.items() if not math.isnan(value)}

    def to_dict(self) -> dict[str, Any]:
        """Return all means, by corpus and task."""
        return {
            "texts": {text.corpus: text.to_dict() for text in self.texts},
            "tasks": {task.task: task.to_dict() for task in self.tasks},
        }


def fingerprint_documents(documents: Sequence[object]) -> str:
    """SHA-256 over the documents of a task, in order."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(repr(document).encode())
    return digest.hexdigest()
