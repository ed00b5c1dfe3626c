"""Which of two arms is better, by how much, and how sure that is. Knows no files and no models.

Lower values are better. Seeds are paired: both arms had the same order of windows and the same held-out text.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from src.evaluation.results import paired_t, standard_error, student_t_tail

CONFIDENCE = 0.95
Verdict = Literal["better", "worse", "no difference at this resolution", "too small to matter", "diverged", "no result"]


@dataclass(frozen=True, kw_only=True)
class MeanDifference:
    """A mean of paired differences, the first arm minus the second, with its confidence interval."""

    mean: float
    stderr: float
    """NaN for a single pair."""
    low: float
    high: float
    p_value: float
    """Two-sided paired t test; NaN for a single pair."""
    pairs: int

    @property
    def is_exact(self) -> bool:
        """Whether every pair is equal."""
        return self.mean == 0 == self.stderr


def mean(values: Sequence[float]) -> float:
    """Return the mean; NaN without values."""
    return math.fsum(values) / len(values) if values and all(map(math.isfinite, values)) else math.nan


@cache
def t_quantile(tail: float, degrees: int) -> float:
    """Return the t that Student's |t| exceeds with probability `tail`, above 0 and below 1."""
    low, high = 0.0, 1.0
    while student_t_tail(high, degrees) > tail:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if student_t_tail(middle, degrees) > tail else (low, middle)
    return high


def paired(first: Sequence[float], second: Sequence[float]) -> MeanDifference:
    """Compare two measurements of the same things in the same order: paired t test and its confidence interval.

    A single pair has no error; equal differences have an error of zero. What is not finite gives NaN.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} values against {len(second)}; pairs need as many of both, at least one")
    differences = [one - other for one, other in zip(first, second, strict=True)]
    if not all(map(math.isfinite, differences)):
        return MeanDifference(
            mean=math.nan, stderr=math.nan, low=math.nan, high=math.nan, p_value=math.nan, pairs=len(first)
        )
    center, pairs = mean(differences), len(differences)
    if pairs == 1:
        return MeanDifference(mean=center, stderr=math.nan, low=-math.inf, high=math.inf, p_value=math.nan, pairs=1)
    stderr = 0.0 if len(set(differences)) == 1 else standard_error(differences)  # rounding of equal ones is no error
    half = stderr * t_quantile(1 - CONFIDENCE, pairs - 1) if stderr else 0.0
    return MeanDifference(
        mean=center,
        stderr=stderr,
        low=center - half,
        high=center + half,
        p_value=paired_t(differences, stderr),
        pairs=pairs,
    )


def judge(difference: MeanDifference, smallest: float) -> Verdict:
    """Return what an interval says, when differences below `smallest` are of no interest."""
    if math.isnan(difference.mean):
        return "diverged"
    if difference.is_exact:
        return "no difference at this resolution"
    if -smallest < difference.low and difference.high < smallest:
        return "too small to matter"
    if difference.high < 0:
        return "better"
    if difference.low > 0:
        return "worse"
    return "no difference at this resolution"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one cell scored."""

    loss: float
    windows: Sequence[float]
    """Losses of the held-out windows."""


@dataclass(frozen=True, kw_only=True)
class ArmComparison:
    """One arm against another, over the seeds that both have a result for."""

    seeds: tuple[int, ...]
    missing: tuple[int, ...]
    """Seeds that only one of them has."""
    over_seeds: MeanDifference | None
    """None without a common seed."""
    by_window: Mapping[int, MeanDifference]
    """Within each seed, paired by held-out window; empty where the windows differ."""
    verdict: Verdict
    test: str
    """The test that the verdict is from."""


def compare_arms(first: Mapping[int, Measured], second: Mapping[int, Measured], smallest: float) -> ArmComparison:
    """Compare two arms by their results for each seed.

    The verdict is from the paired t test over seeds. A single seed has no such test: the verdict is then from the test
    over held-out windows within that seed, which says nothing about other seeds.
    """
    seeds = tuple(sorted(set(first) & set(second)))
    missing = tuple(sorted(set(first) ^ set(second)))
    by_window = {
        seed: paired(first[seed].windows, second[seed].windows)
        for seed in seeds
        if len(first[seed].windows) == len(second[seed].windows) > 0
    }
    if not seeds:
        return ArmComparison(
            seeds=(), missing=missing, over_seeds=None, by_window={}, verdict="no result", test="no common seed"
        )
    over_seeds = paired([first[seed].loss for seed in seeds], [second[seed].loss for seed in seeds])
    decisive, test = over_seeds, f"paired t test over {len(seeds)} seeds"
    if len(seeds) == 1 and math.isfinite(over_seeds.mean):
        decisive = by_window.get(seeds[0], over_seeds)
        test = f"paired t test over {decisive.pairs} windows of one seed"
    return ArmComparison(
        seeds=seeds,
        missing=missing,
        over_seeds=over_seeds,
        by_window=by_window,
        verdict=judge(decisive, smallest),
        test=test,
    )
