"""What the rows of a study say: means over seeds, comparisons, verdicts. Knows neither Markdown nor plots."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from src.evaluation.results import standard_error
from src.studies.cells import Choice, reported_cells
from src.studies.definition import Arm, Hypothesis, Study
from src.studies.rows import Row
from src.studies.statistics import ArmComparison, MeanDifference, Measured, compare_arms, mean

Answer = Literal["holds", "does not hold", "undecided"]


@dataclass(frozen=True)
class ArmRows:
    """The reported rows of one arm, one a seed."""

    arm: Arm
    rows: Sequence[Row]

    def mean(self, value: Callable[[Row], float]) -> float:
        """Return the mean over seeds; NaN where one has no finite value."""
        return mean([value(row) for row in self.rows])

    def stderr(self, value: Callable[[Row], float]) -> float:
        """Return its standard error; NaN for fewer than two seeds."""
        values = [value(row) for row in self.rows]
        return standard_error(values) if all(map(math.isfinite, values)) else math.nan


@dataclass(frozen=True)
class Summary:
    """A study and its rows."""

    study: Study
    rows: Sequence[Row]

    @property
    def arms(self) -> Mapping[str, ArmRows]:
        """Arms with a reported result, in the study's order."""
        found = {name: ArmRows(arm, self.rows_of(name)) for name, arm in self.study.arms.items()}
        return {name: arm for name, arm in found.items() if arm.rows}

    @property
    def missing(self) -> list[str]:
        """Names of cells without a result."""
        present = {row.key for row in self.rows}
        return [cell.name for cell in reported_cells(self.study, Choice()) if cell.key not in present]

    def compare(self, arm: str, than: str, *, on_general: bool = False) -> ArmComparison:
        """Compare two arms over the seeds that both ran on the same corpus: on held-out text, or on general text."""
        first, second = ({row.seed: row for row in self.rows_of(name)} for name in (arm, than))
        other_text = {seed for seed in first.keys() & second.keys() if first[seed].corpus != second[seed].corpus}
        one, two = (
            {seed: _measured(row, on_general=on_general) for seed, row in rows.items()}
            for rows in (first, {seed: row for seed, row in second.items() if seed not in other_text})
        )
        return compare_arms(one, two, self.study.smallest_difference)

    def comparisons(self) -> list[tuple[str, str]]:
        """Return which arms to compare at equal tokens: each with the baseline, longer or shorter ones in pairs."""
        arms = self.arms
        tokens = {name: arm.rows[0].tokens for name, arm in arms.items()}
        first = next(
            (name for name in (self.study.baseline, *arms) if name in arms and arms[name].arm.is_trained), None
        )
        usual = None if first is None or self.study.baseline not in arms else tokens[first]
        pairs = [(name, self.study.baseline) for name in arms if tokens[name] == usual and name != self.study.baseline]
        others = itertools.combinations([name for name in arms if tokens[name] != usual], 2)
        return pairs + [(later, first) for first, later in others if tokens[first] == tokens[later]]

    def rows_of(self, arm: str) -> Sequence[Row]:
        """Return the reported rows of an arm, by seed."""
        return sorted((row for row in self.rows if row.arm == arm and not row.value), key=lambda row: row.seed)

    @property
    def has_general_losses(self) -> bool:
        """Whether arms started from a run, and what they forget was measured."""
        return any(math.isfinite(row.general_loss) for row in self.rows) and self.study.baseline in self.arms

    def gain(self, arm: str) -> MeanDifference | None:
        """Return by how much an arm's loss is below the baseline's, over seeds; None where they share none."""
        return self.compare(self.study.baseline, arm).over_seeds

    def share(self, arm: str) -> tuple[float, float]:
        """Return an arm's gain as a share of that of `share_of`, and its standard error; NaN where it is unknown."""
        of = self.study.share_of or arm
        losses = [
            {row.seed: row.held_out_loss for row in self.rows_of(name)} for name in (self.study.baseline, arm, of)
        ]
        seeds = sorted(set.intersection(*map(set, losses)))
        base, found, best = ([each[seed] for seed in seeds] for each in losses)
        shares = [
            (one - two) / (one - three) for one, two, three in zip(base, found, best, strict=True) if one != three
        ]
        return mean(shares), standard_error(shares)

    def answer(self, hypothesis: Hypothesis) -> Answer:
        """Return whether a hypothesis is what was found."""
        verdict = self.compare(hypothesis.arm, hypothesis.than, on_general=hypothesis.on_general).verdict
        if verdict in ("no result", "diverged", "no difference at this resolution"):
            return "undecided"
        expected = "too small to matter" if hypothesis.expect == "no difference" else hypothesis.expect
        return "holds" if verdict == expected else "does not hold"


def _measured(row: Row, *, on_general: bool) -> Measured:
    if on_general:
        return Measured(loss=row.general_loss, windows=row.general_windows)
    return Measured(loss=row.held_out_loss, windows=row.windows)
