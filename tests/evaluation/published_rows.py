"""Hand-made rows in the form of the published sets: the sets themselves belong to others and are not here."""

import gzip
import json
from pathlib import Path
from typing import Any

from src.evaluation.tasks import TASKS, PublishedTask

Row = dict[str, Any]
PUBLISHED = {name: task for name, task in TASKS.items() if isinstance(task, PublishedTask)}

ANIMALS = ("cat", "dog", "owl", "bee", "cow")
SOUNDS = ("meows", "barks", "hoots", "buzzes", "moos")


def _multiple_choice(number: int) -> Row:
    choices = {"text": [SOUNDS[(number + shift) % 5] for shift in range(4)], "label": ["A", "B", "C", "D"]}
    return {"question": f"What does {ANIMALS[number % 5]} {number} do?", "choices": choices, "answerKey": "A"}


def _boolq(number: int) -> Row:
    animal, sound = ANIMALS[number % 5], SOUNDS[number % 5]
    return {
        "passage": f"A {animal} {sound} {number} times.",
        "question": f"does a {animal} make a sound",
        "answer": number % 2 == 0,
    }


def _hellaswag(number: int) -> Row:
    return {
        "activity_label": "Listening",
        "ctx_a": f"It is {number} o'clock.",
        "ctx_b": f"the {ANIMALS[number % 5]}",
        "endings": [SOUNDS[(number + shift) % 5] for shift in range(4)],
        "label": "0",
    }


def _piqa(number: int) -> Row:
    return {"goal": f"Wake animal {number}", "sol1": "Call it.", "sol2": "Wait for years.", "label": number % 2}


def _social_iqa(number: int) -> Row:
    return {
        "context": f"Kim heard the {ANIMALS[number % 5]} {number} times.",
        "question": "What does Kim do?",
        "answerA": "listen",
        "answerB": "sleep",
        "answerC": "run",
        "label": str(1 + number % 3),
    }


def _race(number: int) -> Row:
    problems = [
        {"question": f"The {ANIMALS[number % 5]}  _  .", "answer": "A", "options": list(SOUNDS[:4])},
        {"question": "How many are there?", "answer": "BCD"[number % 3], "options": ["0", "1", "2", "3"]},
    ]
    return {"article": f"There are {number} animals. They make sounds.", "problems": problems}


FILES = {
    "arc_easy.test.jsonl.gz": [_multiple_choice(number) for number in range(50)],
    "arc_challenge.test.jsonl": [_multiple_choice(number) for number in range(50, 100)],
    "boolq.validation.jsonl": [_boolq(number) for number in range(50)],
    "hellaswag.validation.jsonl": [_hellaswag(number) for number in range(50)],
    "lambada_openai.test.jsonl": [{"text": f"the {ANIMALS[n % 5]} {SOUNDS[n % 5]} {n}"} for n in range(50)],
    "piqa.validation.jsonl": [_piqa(number) for number in range(50)],
    "social_iqa.validation.jsonl": [_social_iqa(number) for number in range(50)],
    "race.test.jsonl": [_race(number) for number in range(3)],
}


def write_rows(folder: Path) -> None:
    """Write all sets into `folder`."""
    folder.mkdir(exist_ok=True)
    for name, rows in FILES.items():
        opener = gzip.open if name.endswith(".gz") else open
        with opener(folder / name, "wt", encoding="utf-8") as handle:
            handle.write("".join(json.dumps(row) + "\n" for row in rows))
