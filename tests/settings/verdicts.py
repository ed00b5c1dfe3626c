"""What a setting makes of values of every kind, as a test states it: taken as something, or refused in one line."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

HUGE, LARGEST = "9" * 30, str(2**63 - 1)
VALUES = (
    *("word", "-1", "0", "1", "1.5", "nan", "inf", "-inf", "", "[1, 2]", "true", "null", LARGEST, HUGE),
    *("{a: 1}", "a\0", "a\nb"),
)
"""Tried for every setting, with those that its verdicts add."""
TEXTS = (*(value for value in VALUES if value not in ("", "a\0")), "12e5", "ü =,")
"""Those that are text."""
LM_EVAL_WORDS = ("word", "-1", "0", "1", "[1, 2]", "true", "null") if find_spec("lm_eval") else VALUES
"""Names that lm-eval's index alone could tell from those of tasks, and reading it takes ten seconds."""
REFUSED = object()
"""What becomes of a value that is refused."""


@dataclass(frozen=True)
class Verdicts:
    """What values become; a value of `VALUES` that is not named is refused, as are those of `refused`."""

    accepted: Mapping[str, object]
    refused: Sequence[str] = ()
    untold: Sequence[str] = ()
    """Values that another package decides on."""

    def of_all(self) -> dict[str, object]:
        """Return what becomes of each value."""
        values = [value for value in (*VALUES, *self.accepted, *self.refused) if value not in self.untold]
        return {value: self.accepted.get(value, REFUSED) for value in values}

    @property
    def all_refused(self) -> list[str]:
        return [value for value, verdict in self.of_all().items() if verdict is REFUSED]


def _stated(kind: Callable[[str], object], accepted: str, refused: str, or_null: bool) -> Verdicts:
    null = {"null": None} if or_null else {}
    return Verdicts({**{text: kind(text) for text in accepted.split()}, **null}, refused.split())


def whole(accepted: str, refused: str = "", *, or_null: bool = False) -> Verdicts:
    """State the whole numbers that are accepted."""
    return _stated(int, accepted, refused, or_null)


def number(accepted: str, refused: str = "", *, or_null: bool = False) -> Verdicts:
    """State the numbers that are accepted."""
    return _stated(float, accepted, f"{refused} 1e39 1e400", or_null)


def choice(accepted: str, refused: str = "", *, or_null: bool = False) -> Verdicts:
    """State the words that are accepted."""
    return _stated(str, accepted, refused, or_null)


@dataclass
class Outcome:
    """What a command printed, and its exit code."""

    code: int
    output: str
    errors: list[str]


RunVerb = Callable[..., Outcome]


def require_refused(found: Outcome, name: str, what: str) -> None:
    """Assert that a command ended with one line that names a key or flag."""
    assert (found.code, found.output, len(found.errors)) == (2, "", 1), (what, found)
    assert found.errors[0].startswith("error: "), (what, found)
    assert name in found.errors[0], (what, found)
