"""Numbers and tables as a study's page writes them, in Markdown."""

import math
from collections.abc import Callable

from src.studies.rows import Row
from src.studies.statistics import MeanDifference
from src.studies.summary import ArmRows


def table(*headings: str, texts: int = 1) -> list[str]:
    """Return the first lines of a table whose columns after the first `texts` hold numbers."""
    return [line(*headings), line(*("---" if index < texts else "---:" for index in range(len(headings))))]


def line(*cells: str) -> str:
    """Return a row of a table."""
    return f"| {' | '.join(cells)} |"


def number(value: float, digits: int = 4) -> str:
    """Return a number; empty for NaN, `diverged` for what is infinite."""
    return f"{value:.{digits}f}" if math.isfinite(value) else ("" if math.isnan(value) else "diverged")


def with_error(arm: ArmRows, value: Callable[[Row], float]) -> str:
    """Return an arm's mean over seeds and its standard error."""
    center, error = arm.mean(value), arm.stderr(value)
    if math.isnan(center):
        return "diverged"
    return number(center) + (f" ± {error:.4f}" if math.isfinite(error) else "")


def signed(value: float, error: float) -> str:
    """Return a difference and its standard error."""
    if math.isnan(value):
        return "diverged"
    return f"{value:+.4f}" + (f" ± {error:.4f}" if math.isfinite(error) else "")


def interval(difference: MeanDifference) -> str:
    """Return a confidence interval; empty where there is none."""
    return f"{difference.low:+.4f} to {difference.high:+.4f}" if math.isfinite(difference.low) else ""


def differences(found: MeanDifference | None) -> tuple[str, str, str]:
    """Return a difference, its interval and its p; empty ones where there is none."""
    if found is None:
        return "", "", ""
    return signed(found.mean, found.stderr), interval(found), p_value(found.p_value)


def p_value(value: float) -> str:
    """Return a probability; empty for NaN."""
    return "" if math.isnan(value) else (f"{value:.2g}" if value >= 1e-4 else "< 0.0001")


def rise(arm: ArmRows, value: Callable[[Row], float]) -> str:
    """Return the mean of another loss of an arm, and by how much it is above the held-out loss."""
    changed = arm.mean(value)
    above = changed - arm.mean(lambda row: row.held_out_loss)
    return "" if math.isnan(changed) else f"{changed:.4f} ({above:+.4f})"


def megabytes(parameters: int) -> str:
    """Return what parameters take in 16 bit."""
    return f"{2 * parameters / 1e6:.2f} MB"


def millions(count: int) -> str:
    """Return a number of parameters."""
    return f"{count / 1e6:.2f} M" if count else "0"
