"""Rounds of a benchmark of training steps: who takes turns, what is kept, how it is laid out.

Contestants take turns, so that a machine whose speed drifts treats them alike; ratios are medians over rounds.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from src.accounting.flops import step_flops
from src.benchmarks.step_timing import Contestant, Parts, StepTimes
from src.cli import progress_bar


@dataclass(frozen=True, kw_only=True)
class Result:
    """One contestant over all rounds; medians."""

    name: str
    forward_seconds: float
    backward_seconds: float
    optimizer_seconds: float
    tokens_per_second: float
    model_flops_utilization: float
    """Of the matrix-product rate measured in the same run, at the operations truly executed."""
    peak_bytes: int | None
    against_baseline: float
    """Forward and backward against the baseline's of the same round."""


def run_rounds(
    contestants: Sequence[Contestant], parts: Parts | None, rounds: int
) -> tuple[dict[str, list[StepTimes]], list[float]]:
    """Let the contestants take turns; return their times and the added parts' seconds, round by round."""
    times: dict[str, list[StepTimes]] = {contestant.name: [] for contestant in contestants}
    added: list[float] = []
    for contestant in contestants:
        contestant.step()  # the first step allocates
    with progress_bar("rounds", rounds) as advance:
        for _ in range(rounds):
            for contestant in contestants:
                times[contestant.name].append(contestant.step())
            if parts is not None:
                added.append(parts.experts() + parts.mixture())
            advance(1)
    return times, added


def paired_ratio(numerator: Sequence[StepTimes], denominator: Sequence[StepTimes]) -> float:
    """Median over rounds of the ratio of forward and backward seconds."""
    pairs = zip(numerator, denominator, strict=True)
    return statistics.median(mine.compute / theirs.compute for mine, theirs in pairs)


def summarize(
    contestants: Sequence[Contestant], times: dict[str, list[StepTimes]], rate: float, baseline: str
) -> list[Result]:
    """Turn times into medians and paired ratios; measures peak memory, one more step each."""
    return [_summarize(contestant, times[contestant.name], times[baseline], rate) for contestant in contestants]


def _summarize(contestant: Contestant, times: list[StepTimes], baseline: list[StepTimes], rate: float) -> Result:
    tokens = contestant.batch.numel()
    step = statistics.median(item.total for item in times)
    compute = statistics.median(item.compute for item in times)
    return Result(
        name=contestant.name,
        forward_seconds=statistics.median(item.forward for item in times),
        backward_seconds=statistics.median(item.backward for item in times),
        optimizer_seconds=statistics.median(item.optimizer for item in times),
        tokens_per_second=tokens / step,
        model_flops_utilization=step_flops(contestant.config, contestant.batch, head=False) / compute / rate,
        peak_bytes=contestant.peak_bytes(),
        against_baseline=paired_ratio(times, baseline),
    )


def results_table(results: Sequence[Result], title: str, baseline: str) -> Table:
    """Lay the results out for a terminal."""
    table = Table(title=title, title_justify="left")
    table.caption = f"fwd, bwd, step: seconds forward, backward, of the optimizer; over {baseline}: fwd + bwd"
    for heading in ("", "fwd", "bwd", "step", "tokens/s", "MFU", "peak MiB", f"over {baseline}"):
        table.add_column(heading, justify="right" if heading else "left")
    for result in results:
        table.add_row(
            result.name,
            f"{result.forward_seconds:.2f}",
            f"{result.backward_seconds:.2f}",
            f"{result.optimizer_seconds:.2f}",
            f"{result.tokens_per_second:,.0f}",
            f"{result.model_flops_utilization:.0%}",
            "" if result.peak_bytes is None else f"{result.peak_bytes / 2**20:,.0f}",
            f"{result.against_baseline:.2f}",
        )
    return table
