"""What a model scored, document by document, and tests of paired differences between two models.

A run keeps the scores of both its forms in `scores.json`, so that later models can be paired with them. The statistics
know nothing of what was measured.

N windows or documents.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from src.evaluation.perplexity import Band, Score
from src.run_directory import read_json
from src.system.files import write_json


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """How two measurements of the same documents differ, the second minus the first."""

    first: float
    second: float
    difference: float
    stderr: float
    """Standard error of the difference, from the differences of each document."""
    test: str
    """`McNemar` (exact) where each document is right or wrong, else Student's `t`."""
    p_value: float
    """Probability of a difference at least this large when there is none; 1 when all documents agree."""
    documents: int


def _mean(values: Sequence[float]) -> float:
    total = math.fsum(values) if all(map(math.isfinite, values)) else sum(values)  # fsum refuses inf - inf
    return total / len(values)


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean of values (N,); NaN for fewer than two."""
    if len(values) < 2:
        return math.nan
    return float(torch.tensor(values, dtype=torch.float64).std()) / math.sqrt(len(values))


def paired_difference(first: Sequence[float], second: Sequence[float]) -> PairedDifference:
    """Compare two measurements (N,) of the same documents in the same order.

    Raises:
        ValueError: they are not of the same documents.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} against {len(second)} documents; a paired comparison needs the same ones")
    differences = [after - before for before, after in zip(first, second, strict=True)]
    binary = {*first, *second} <= {0.0, 1.0}
    stderr = standard_error(differences)
    return PairedDifference(
        first=_mean(first),
        second=_mean(second),
        difference=_mean(differences),
        stderr=stderr,
        test="McNemar" if binary else "t",
        p_value=mcnemar(differences) if binary else paired_t(differences, stderr),
        documents=len(first),
    )


def mcnemar(differences: Sequence[float]) -> float:
    """Exact McNemar test: of the documents where one was right and the other wrong, do both win equally often?"""
    won, lost = sum(value > 0 for value in differences), sum(value < 0 for value in differences)
    discordant = won + lost
    tail = sum(math.comb(discordant, wins) for wins in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2**discordant)


def paired_t(differences: Sequence[float], stderr: float) -> float:
    """Two-sided paired t test of a mean difference of zero."""
    mean = _mean(differences)
    if mean == 0 or len(differences) < 2:
        return 1.0
    return 0.0 if stderr == 0 else student_t_tail(abs(mean) / stderr, len(differences) - 1)


def student_t_tail(statistic: float, degrees: int) -> float:
    """Return P(|t| >= statistic) of Student's distribution, by integration over atan(t / sqrt(degrees))."""
    angle = math.atan(statistic / math.sqrt(degrees))

    def area(start: float) -> float:
        angles = torch.linspace(start, math.pi / 2, 200_001, dtype=torch.float64)
        return float(torch.trapezoid(angles.cos().clamp(min=0) ** (degrees - 1), angles))

    return area(angle) / area(0.0)


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
        return standard_error(self.window_losses)

    def metrics(self) -> dict[str, float]:
        values = {f"{self.corpus}/{name}": value for name, value in self.score.to_dict().items()}
        return {**values, f"{self.corpus}/loss_stderr": self.stderr}

    def to_dict(self) -> dict[str, Any]:
        bands = [{"counts": band.name, **asdict(band)} for band in self.bands]
        stderr = self.stderr if math.isfinite(self.stderr) else None
        return {**self.score.to_dict(), "loss_stderr": stderr, "windows": len(self.window_losses), "bands": bands}


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """One task: what was answered, and how well."""

    task: str
    values: dict[str, list[float]]
    """Per metric (N,): one number per document."""
    predictions: Sequence[int | str]
    """(N,) the choice with the highest log-likelihood, or 1 where the continuation is the greedy one, else 0, or the
    text that was written; empty where nothing is predicted."""
    gaps: list[float]
    """(N,) by how much each prediction won: below rounding it may go either way; infinite for texts."""
    fingerprint: str
    """Of the documents: only scores of the same ones can be compared."""
    scores: dict[str, float] = field(default_factory=dict[str, float])
    """Metrics as the task aggregates them; others are means of `values`."""
    errors: dict[str, float] = field(default_factory=dict[str, float])
    """Standard errors of `scores`; NaN where the task has none."""
    documents: int = 0
    """How many were scored, where that is not the length of `predictions`: 0."""
    about: dict[str, int | str] = field(default_factory=dict[str, int | str])
    """Of a task that is defined elsewhere: `num_fewshot`, examples in front of each document, and its `version`."""

    @property
    def num_documents(self) -> int:
        return self.documents or len(self.predictions)

    def figures(self) -> dict[str, tuple[float, float]]:
        """Return score and standard error of every metric."""
        means = {name: (_mean(values), standard_error(values)) for name, values in self.values.items()}
        return means | {name: (score, self.errors.get(name, math.nan)) for name, score in self.scores.items()}

    def mean(self, metric: str) -> float:
        return _mean(self.values[metric])

    def metrics(self) -> dict[str, float]:
        figures = self.figures().items()
        scores = {f"{self.task}/{metric}": score for metric, (score, _) in figures}
        return scores | {f"{self.task}/{metric}_stderr": error for metric, (_, error) in figures}

    def to_dict(self) -> dict[str, Any]:
        values = {name.removeprefix(f"{self.task}/"): value for name, value in self.metrics().items()}
        plain = {name: None if math.isnan(value) else value for name, value in values.items()}
        return {**plain, "documents": self.num_documents, **self.about}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything that one model scored."""

    texts: list[TextScore]
    tasks: list[TaskScore]

    @property
    def diverged(self) -> list[str]:
        return [text.corpus for text in self.texts if not math.isfinite(text.score.perplexity)]

    def metrics(self) -> dict[str, float]:
        """Return all figures that are numbers: those of a single document have no standard error."""
        values: dict[str, float] = {}
        for part in (*self.texts, *self.tasks):
            values |= part.metrics()
        return {name: value for name, value in values.items() if not math.isnan(value)}

    def to_dict(self) -> dict[str, Any]:
        return {
            "texts": {text.corpus: text.to_dict() for text in self.texts},
            "tasks": {task.task: task.to_dict() for task in self.tasks},
            "diverged": self.diverged,
        }


def write_scores(path: Path, evaluations: Mapping[str, Evaluation]) -> None:
    """Write evaluations by name, document by document, as JSON; what is not finite becomes null."""
    write_json(path, {name: asdict(evaluation) for name, evaluation in evaluations.items()})


def read_scores(path: Path) -> dict[str, Evaluation]:
    """Read what `write_scores` wrote; null is NaN again. RunError where the file is missing or damaged."""
    return {name: _evaluation(_without_null(values)) for name, values in read_json(path).items()}


def _evaluation(values: dict[str, Any]) -> Evaluation:
    texts, tasks = list[TextScore](), [TaskScore(**task) for task in values["tasks"]]
    for text in values["texts"]:
        score, bands = Score(**text.pop("score")), [Band(**band) for band in text.pop("bands")]
        texts.append(TextScore(**text, score=score, bands=bands))
    return Evaluation(texts=texts, tasks=tasks)


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_null(item) for item in value]
    return math.nan if value is None else value


def fingerprint_documents(documents: Sequence[object]) -> str:
    """SHA-256 over the documents of a task, in order."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(repr(document).encode())
    return digest.hexdigest()
