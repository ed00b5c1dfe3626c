"""Hand-made rows of one task of each kind that lm-eval knows."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.evaluation.published_rows import ANIMALS, SOUNDS

Row = dict[str, Any]


def write(folder: Path, name: str, rows: Sequence[Row]) -> None:
    """Write rows as `<folder>/<name>`, compressed if the name says so."""
    folder.mkdir(exist_ok=True)
    opener = gzip.open if name.endswith(".gz") else open
    with opener(folder / name, "wt", encoding="utf-8") as handle:
        handle.write("".join(json.dumps(row) + "\n" for row in rows))


def sciq(count: int) -> list[Row]:
    return [
        {
            "question": f"What does {ANIMALS[n % 5]} {n} do?",
            "support": f"A {ANIMALS[n % 5]} {SOUNDS[n % 5]}.",
            "correct_answer": SOUNDS[n % 5],
            **{f"distractor{shift}": SOUNDS[(n + shift) % 5] for shift in (1, 2, 3)},
        }
        for n in range(count)
    ]


def wikitext(count: int) -> list[Row]:
    return [
        {"page": f" = The {ANIMALS[n % 5]} = \n It is {n} @.@ 5 years old , and it {SOUNDS[n % 5]} . \n" * (n + 1)}
        for n in range(count)
    ]


def gsm8k(first: int, count: int) -> list[Row]:
    return [
        {"question": f"Kim has {n} cats and buys {n}. How many?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"}
        for n in range(first, first + count)
    ]


def mmlu(first: int, count: int) -> list[Row]:
    return [
        {
            "question": f"What does {ANIMALS[n % 5]} {n} do?",
            "choices": [SOUNDS[(n + shift) % 5] for shift in range(4)],
            "answer": n % 4,
            "subject": "animals",
        }
        for n in range(first, first + count)
    ]
