"""Interleaved rounds: every contender meets the same drift of the machine, and figures are compared pairwise."""

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass
class Timings:
    """Seconds of each contender, one per round, in the same order of rounds."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, seconds: float) -> None:
        """Record one round of a contender."""
        self.seconds.setdefault(name, []).append(seconds)

    def median(self, name: str) -> float:
        """Median seconds of a contender."""
        return statistics.median(self.seconds[name])

    def percentile(self, name: str, percent: float) -> float:
        """Nearest-rank percentile of a contender's seconds."""
        ranked = sorted(self.seconds[name])
        return ranked[min(len(ranked) - 1, int(len(ranked) * percent / 100))]

    def ratio(self, name: str, reference: str) -> float:
        """Median over rounds of the ratio of two contenders' seconds."""
        pairs = zip(self.seconds[name], self.seconds[reference], strict=True)
        return statistics.median(one / other for one, other in pairs)

    def difference(self, name: str, reference: str) -> float:
        """Median over rounds of the difference of two contenders' seconds."""
        pairs = zip(self.seconds[name], self.seconds[reference], strict=True)
        return statistics.median(one - other for one, other in pairs)


def run_rounds(
    contenders: Mapping[str, Callable[[int], float]], rounds: int, advance: Callable[[int], None]
) -> Timings:
    """Call each contender once per round with the round's number, in an order shuffled anew; it returns its seconds."""
    timings, order = Timings(), random.Random(0)
    for number in range(rounds):
        names: Sequence[str] = order.sample(list(contenders), len(contenders))
        for name in names:
            timings.add(name, contenders[name](number))
        advance(1)
    return timings


@dataclass(frozen=True)
class Target:
    """A figure that should hold, and whether it does."""

    name: str
    found: float
    limit: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        """Whether the figure is on the right side of its limit."""
        return self.found >= self.limit if self.at_least else self.found <= self.limit

    def line(self) -> str:
        """Say it in one line."""
        sign = ">=" if self.at_least else "<="
        return f"{'holds' if self.holds else 'MISSED'}  {self.name}: {self.found:.3g} {sign} {self.limit:g}"

    def to_dict(self) -> dict[str, str | float | bool]:
        """Return all figures by name."""
        return {"name": self.name, "found": self.found, "limit": self.limit, "holds": self.holds}
