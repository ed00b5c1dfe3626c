"""Counts of what a source gave, shard by shard and in total, and the budgets that they must keep."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import reduce
from typing import Self

from src.data.config import DataConfig
from src.data.corpus import Skipped
from src.errors import DataError

_SETTLED_RECORDS = 10_000
"""Records after which a share far over its budget stops the work at once; else the end of the source decides."""
_EARLY_FACTOR = 10
"""How far over: what is wrong may lie at the beginning."""
_EMPTY = "empty"


@dataclass(kw_only=True)
class SplitCount:
    """What one side of the split holds."""

    documents: int = 0
    tokens: int = 0
    """Ids, each document's separator included."""
    bytes: int = 0
    """UTF-8 bytes of text."""

    def __add__(self, other: Self) -> Self:
        """Return the sum."""
        return type(self)(
            documents=self.documents + other.documents,
            tokens=self.tokens + other.tokens,
            bytes=self.bytes + other.bytes,
        )


@dataclass(kw_only=True)
class Tally:
    """What was read, kept and left out."""

    records: int = 0
    train: SplitCount = field(default_factory=SplitCount)
    validation: SplitCount = field(default_factory=SplitCount)
    duplicates: int = 0
    """Documents dropped because an equal one came before."""
    unremembered: int = 0
    """Documents whose later duplicates are kept, because the memory for hashes was full."""
    skipped: dict[str, int] = field(default_factory=dict[str, int])
    """Records that gave no document, by problem."""
    examples: dict[str, str] = field(default_factory=dict[str, str])
    """The first record of each problem, as `file:line: what is wrong`."""

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> Self:
        """Read what `dataclasses.asdict` gave."""
        sides = {side: SplitCount(**values[side]) for side in ("train", "validation")}  # type: ignore[arg-type]
        return cls(**{**values, **sides})  # type: ignore[arg-type]

    def __add__(self, other: Self) -> Self:
        """Return the sum; examples are those that came first."""
        return type(self)(
            records=self.records + other.records,
            train=self.train + other.train,
            validation=self.validation + other.validation,
            duplicates=self.duplicates + other.duplicates,
            unremembered=self.unremembered + other.unremembered,
            skipped={
                problem: self.skipped.get(problem, 0) + other.skipped.get(problem, 0)
                for problem in self.skipped | other.skipped
            },
            examples=other.examples | self.examples,
        )

    def skip(self, record: Skipped) -> None:
        """Count a record that gives no document."""
        self.records += 1
        self.skipped[record.problem] = self.skipped.get(record.problem, 0) + 1
        self.examples.setdefault(record.problem, f"{record.where}: {record.detail}")


def total(tallies: Iterable[Tally]) -> Tally:
    """Return the sum of tallies."""
    return reduce(Tally.__add__, tallies, Tally())


def require_within_budgets(tally: Tally, config: DataConfig, label: str, *, at_end: bool) -> None:
    """Raise DataError, naming file and line, when more records were skipped than the config allows.

    Before the end of a source too few records may have been seen to judge; then nothing happens.
    """
    if not at_end and tally.records < _SETTLED_RECORDS:
        return
    malformed = [problem for problem in tally.skipped if problem != _EMPTY]
    for problems, key in ((malformed, "max_malformed_fraction"), ([_EMPTY], "max_empty_fraction")):
        count, allowed = sum(tally.skipped.get(problem, 0) for problem in problems), getattr(config, key)
        if count > allowed * tally.records * (1 if at_end else _EARLY_FACTOR):
            first = next(tally.examples[problem] for problem in problems if problem in tally.examples)
            raise DataError(
                f"{first}; {count:,} of {tally.records:,} records of {label} are {' or '.join(problems)}, more than "
                f"data.{key} ({allowed:g}) allows; correct the text, leave it out, or raise that share"
            )
