"""Standard errors, and tests of paired differences. Knows nothing of what was measured.

N documents.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch


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

    def to_dict(self) -> dict[str, float | str]:
        """Return everything by name."""
        return asdict(self)


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
        first=math.fsum(first) / len(first),
        second=math.fsum(second) / len(second),
        difference=math.fsum(differences) / len(differences),
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
    mean = math.fsum(differences) / len(differences)
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
