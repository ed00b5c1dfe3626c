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
from src.studies.statistics import ArmComparison, Measured, compare_arms, mean

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

    def compare(self, arm: str, than: str) -> ArmComparison:
        """Compare two arms over the seeds that both ran on the same corpus."""
        first, second = ({row.seed: row for row in self.rows_of(name)} for name in (arm, than))
        other_text = {seed for seed in first.keys() & second.keys() if first[seed].corpus != second[seed].corpus}
        one, two = (
            {seed: Measured(loss=row.held_out_loss, windows=row.windows) for seed, row in rows.items()}
            for rows in (first, {seed: row for seed, row in second.items() if seed not in other_text})
        )
        return compare_arms(one, two, self.study.smallest_difference)

    def comparisons(self) -> list[tuple[str, str]]:
        """Return which arms to compare at equal tokens: each with the baseline, longer or shorter ones in pairs."""
        arms = self.arms
        usual = arms[self.study.baseline].rows[0].tokens if self.study.baseline in arms else None
        tokens = {name: arm.rows[0].tokens for name, arm in arms.items()}
        pairs = [(name, self.study.baseline) for name in arms if tokens[name] == usual and name != self.study.baseline]
        others = itertools.combinations([name for name in arms if tokens[name] != usual], 2)
        return pairs + [(later, first) for first, later in others if tokens[first] == tokens[later]]

    def rows_of(self, arm: str) -> Sequence[Row]:
        """Return the reported rows of an arm, by seed."""
        return sorted((row for row in self.rows if row.arm == arm and not row.value), key=lambda row: row.seed)

    def answer(self, hypothesis: Hypothesis) -> Answer:
        """Return whether a hypothesis is what was found."""
        verdict = self.compare(hypothesis.arm, hypothesis.than).verdict
        if verdict in ("no result", "diverged", "no difference at this resolution"):
            return "undecided"
        expected = "too small to matter" if hypothesis.expect == "no difference" else hypothesis.expect
        return "holds" if verdict == expected else "does not hold"
