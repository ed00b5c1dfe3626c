"""The paper's eight tasks (arXiv:2503.15798, section 4.1): which there are, and their rows in a folder of JSON lines.

Knows lm-eval's file names but never imports it: whether a task can run is checked before a model is trained.
"""

import difflib
import gzip
import importlib.util
import itertools
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.errors import ConfigError, DataError

Row = dict[str, Any]
_ENDINGS = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True, kw_only=True)
class PublishedTask:
    """A task that lm-eval defines."""

    definition: str
    """Its YAML file inside lm-eval's `tasks` folder."""
    split: str
    """The split that it is scored on."""
    columns: tuple[str, ...]
    """What each of its rows must hold."""


PUBLISHED = {
    "arc_challenge": PublishedTask(
        definition="arc/arc_challenge.yaml", split="test", columns=("question", "choices", "answerKey")
    ),
    "arc_easy": PublishedTask(
        definition="arc/arc_easy.yaml", split="test", columns=("question", "choices", "answerKey")
    ),
    "boolq": PublishedTask(
        definition="super_glue/boolq/default.yaml", split="validation", columns=("passage", "question", "label")
    ),
    "hellaswag": PublishedTask(
        definition="hellaswag/hellaswag.yaml",
        split="validation",
        columns=("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    ),
    "lambada_openai": PublishedTask(definition="lambada/lambada_openai.yaml", split="test", columns=("text",)),
    "piqa": PublishedTask(definition="piqa/piqa.yaml", split="validation", columns=("goal", "sol1", "sol2", "label")),
    "race": PublishedTask(definition="race/race.yaml", split="test", columns=("article", "problems")),
    "social_iqa": PublishedTask(
        definition="siqa/siqa.yaml",
        split="validation",
        columns=("context", "question", "answerA", "answerB", "answerC", "label"),
    ),
}
"""The paper's tasks under lm-eval's names."""


def require_known(names: Sequence[str], others: Collection[str]) -> None:
    """Raise ConfigError when a task is neither one of the published nor one of `others`, or needs what is missing."""
    known = sorted({*PUBLISHED, *others})
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            raise ConfigError(f"unknown task {name!r}; did you mean {nearest!r}? Known: {', '.join(known)}")
        if name in PUBLISHED and importlib.util.find_spec("lm_eval") is None:
            raise ConfigError(f"task {name} needs lm-eval, which is not installed; pip install -e '.[eval]'")


def read_rows(folder: Path, name: str, limit: int | None = None) -> list[Row]:
    """Read the rows that a task is scored on from `<folder>/<task>.<split>.jsonl` or `.jsonl.gz`.

    Raises:
        DataError: the folder, the task's file or its split is missing, or a row is not one of the task's.
    """
    task, path = PUBLISHED[name], _find(folder, name)
    rows: list[Row] = []
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(itertools.islice(lines, limit), start=1):
            rows.append(_parse(line, f"{path}, line {number}", name, task.columns))
    if not rows:
        raise DataError(f"{path}: no rows; task {name} needs {', '.join(task.columns)} in each line")
    return rows


def _find(folder: Path, name: str) -> Path:
    split = PUBLISHED[name].split
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of evaluation data; name one that holds {name}.{split}.jsonl")
    for ending in _ENDINGS:
        if (path := folder / f"{name}.{split}{ending}").is_file():
            return path
    other = sorted(path.name for path in folder.glob(f"{name}.*") if path.name.endswith(_ENDINGS))
    if other:
        raise DataError(
            f"{folder}: holds {', '.join(other)}, but task {name} is scored on its {split} split; "
            f"add {name}.{split}.jsonl, or .jsonl.gz"
        )
    raise DataError(f"{folder}: no file for task {name}; add {name}.{split}.jsonl, or .jsonl.gz")


def _parse(line: str, where: str, name: str, columns: Sequence[str]) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error}); each line must be one object") from error
    row = _FORMS.get(name, _unchanged)(row) if isinstance(row, dict) else {}
    missing = [column for column in columns if column not in row]
    if missing:
        raise DataError(f"{where}: no {missing[0]!r}; task {name} needs {', '.join(columns)}")
    return row


def _unchanged(row: Row) -> Row:
    return row


def _boolq(row: Row) -> Row:
    """Google's own files say `answer: true` where SuperGLUE's say `label: 1`."""
    return row if "label" in row or "answer" not in row else {**row, "label": int(row["answer"])}


def _race(row: Row) -> Row:
    """lm-eval reads the problems of an article as a Python literal."""
    problems = row.get("problems")
    return row if problems is None or isinstance(problems, str) else {**row, "problems": repr(problems)}


_FORMS: dict[str, Callable[[Row], Row]] = {"boolq": _boolq, "race": _race}
