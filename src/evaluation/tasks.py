"""Evaluation tasks: what one is, which there are, and how those made of held-out text are asked and scored.

A task is one object that carries its own facts, registered in one line: `register_task(GeneratedTask(...))`. Two come
from held-out text, so that every run is scored on tasks without any data set. All others are lm-eval's: this module
knows their files and rows, and more of the paper's eight (arXiv:2503.15798, section 4.1), but only `harness` and
`definitions` import lm-eval. Documents are text: models with other tokenizers get the same ones.
"""

import difflib
import functools
import glob
import importlib.util
import itertools
import json
import random
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from src.data.files import open_file
from src.errors import ConfigError, DataError
from src.evaluation.held_out import HeldOut
from src.evaluation.likelihood import Likelihood, TextModel
from src.evaluation.results import TaskScore, fingerprint_documents

PASSAGE_TOKENS = 64
"""Tokens of a document of `next_passage`; its last quarter is what is asked for."""
CONTEXT_TOKENS = 64
"""Tokens in front of the word that `repeated_word` asks for."""
CHOICES = 4
GENERATED_DOCUMENTS = 100
"""Documents of a generated task, unless the limit is lower."""
_WORD = re.compile(r" [^\W\d]{4,}")
_ENDINGS = (".jsonl", ".jsonl.gz")
_NAMING = re.compile(r"""^[ \t-]*["']?(?:task|group|tag)["']?[ \t]*:([^\n]*(?:\n[ \t]*[-#][^\n]*)*)""", re.MULTILINE)
"""Lines of a definition that name tasks, tags and groups: a key, and the list under it."""
_COMMENT = re.compile(r"(?:^|\s)#.*", re.MULTILINE)
_NAME = re.compile(r"[\w.()+-]*\w[\w.()+-]*")

Row = dict[str, Any]
ScoreTask = Callable[[TextModel], TaskScore | list[TaskScore]]
"""Scores a model on documents that are already there; a group has a score of its own and one of each of its tasks."""


class Task(Protocol):
    """What `evaluation.tasks` and `evaluate --tasks` name."""

    @property
    def name(self) -> str:
        """What configs, the command line and reports call it."""
        ...

    @property
    def help(self) -> str:
        """One line for `evaluate --help`."""
        ...

    def prepare(self, text: HeldOut, limit: int | None, local_data: Path | None) -> ScoreTask | None:
        """Make or read at most `limit` documents, before a model is trained; None where there are none to score.

        Args:
            text: the run's held-out text.
            limit: documents at most; None takes the task's own number.
            local_data: folder with published data sets; None fetches them.

        Raises:
            ConfigError: something that the task needs is not installed.
            DataError: its data is missing or damaged.
        """
        ...


TASKS: dict[str, Task] = {}
"""Every task by name."""


def register_task(task: Task) -> None:
    """Make `task` available by its name; ValueError where another one has it."""
    if task.name in TASKS:
        raise ValueError(f"a task named {task.name!r} is registered already; choose another name")
    TASKS[task.name] = task


def find_task(name: str, num_fewshot: int | None = None) -> Task:
    """Return a task, tag or group by name, with so many examples in front of each document if it is lm-eval's.

    Raises:
        ConfigError: it is unknown; without lm-eval only where it looks like one that is registered, so that runs whose
            config names tasks of lm-eval can be read.
    """
    task, others = TASKS.get(name), harness_names()
    if task is None and (name in others if others else not difflib.get_close_matches(name, TASKS, cutoff=0.8)):
        task = PublishedTask(name)
    if task is None:
        raise unknown_task(name, others)
    return replace(task, num_fewshot=num_fewshot) if isinstance(task, PublishedTask) else task


def unknown_task(name: str, others: Collection[str]) -> ConfigError:
    """Return the error for a name that is neither registered nor one of `others`."""
    nearest = difflib.get_close_matches(name, [*TASKS, *others], n=1, cutoff=0)[0]
    return ConfigError(
        f"evaluation.tasks: unknown task {name!r}; did you mean {nearest!r}? Known: {', '.join(sorted(TASKS))}, and "
        "what `python -m lm_eval ls tasks` prints"
    )


@functools.cache
def harness_names() -> frozenset[str]:
    """Return what lm-eval's definitions name, all tasks, tags and groups among it; nothing without lm-eval.

    This takes a second where lm-eval's own index, which leaves out parts of groups, takes ten.
    """
    package = importlib.util.find_spec("lm_eval")
    if package is None or package.origin is None:
        return frozenset()
    names = set[str]()
    for path in (Path(package.origin).parent / "tasks").rglob("*"):
        if path.suffix in ("", ".yaml") and path.is_file():
            for values in _NAMING.findall(path.read_text(encoding="utf-8", errors="ignore")):
                names.update(_NAME.findall(_COMMENT.sub("", values)))
    return frozenset(names - {"null"})


def describe_tasks() -> str:
    """Return a line of help for each task."""
    width = max(map(len, TASKS))
    lines = [f"  {name:{width}}  {task.help}" for name, task in TASKS.items()]
    others = "  and every task, tag and group of lm-eval: `python -m lm_eval ls tasks` prints them"
    return "\n".join(["tasks:", *lines, others])


@dataclass(frozen=True)
class TaskDocument:
    """A context and one or several continuations, of which `target` is the true one."""

    context: str
    choices: tuple[str, ...]
    target: int


def next_passage(text: HeldOut, limit: int) -> list[TaskDocument]:
    """Which of four passages continues the text? The other three are from elsewhere in the held-out text."""
    size = min(PASSAGE_TOKENS, text.windows.shape[1])
    pieces = text.windows.unfold(1, size, size).reshape(-1, size)  # (N, size)
    head = size - max(1, size // 4)
    contexts = text.rule.plain.decode_batch(pieces[:, :head].tolist())
    passages = text.rule.plain.decode_batch(pieces[:, head:].tolist())
    draw = random.Random(0)
    documents: list[TaskDocument] = []
    for index in draw.sample(range(len(passages)), len(passages)):
        others = _others(passages, index, draw)
        if len(documents) == limit:
            break
        if others is None or not contexts[index].strip():
            continue
        if not _is_plain("".join((contexts[index], passages[index], *others))):
            continue
        target = draw.randrange(CHOICES)
        documents.append(TaskDocument(contexts[index], (*others[:target], passages[index], *others[target:]), target))
    return documents


def repeated_word(text: HeldOut, limit: int) -> list[TaskDocument]:
    """Complete the text with a word that occurred earlier in it, in the manner of LAMBADA (arXiv:1606.06031)."""
    size = min(2 * CONTEXT_TOKENS, text.windows.shape[1])
    pieces = text.windows.unfold(1, size, size).reshape(-1, size)  # (N, size)
    draw = random.Random(0)
    documents: list[TaskDocument] = []
    for piece in draw.sample(text.rule.plain.decode_batch(pieces.tolist()), len(pieces)):
        candidates = list(_repetitions(piece))
        if len(documents) == limit:
            break
        if candidates and _is_plain(piece):
            context, word = draw.choice(candidates)
            documents.append(TaskDocument(context, (word,), 0))
    return documents


@dataclass(frozen=True)
class GeneratedTask:
    """A task whose documents are made of held-out text."""

    name: str
    help: str
    make: Callable[[HeldOut, int], list[TaskDocument]]
    """Makes at most so many documents."""

    def prepare(self, text: HeldOut, limit: int | None, local_data: Path | None) -> ScoreTask | None:
        documents = self.make(text, GENERATED_DOCUMENTS if limit is None else min(limit, GENERATED_DOCUMENTS))
        return partial(score_documents, self.name, documents) if documents else None


def score_documents(name: str, documents: Sequence[TaskDocument], model: TextModel) -> TaskScore:
    """Score the documents of one task."""
    requests = [model.encode_pair(document.context, choice) for document in documents for choice in document.choices]
    likelihoods = iter(model.log_likelihoods(requests, name))
    scored = [[next(likelihoods) for _ in document.choices] for document in documents]
    answers = [_answer(found) for found in scored]
    hits = [
        float(answer == (document.target if len(document.choices) > 1 else 1))
        for (answer, _), document in zip(answers, documents, strict=True)
    ]
    truths = [found[document.target].log_likelihood for found, document in zip(scored, documents, strict=True)]
    return TaskScore(
        task=name,
        values={"acc": hits, "log_likelihood": truths},
        predictions=[answer for answer, _ in answers],
        gaps=[gap for _, gap in answers],
        fingerprint=fingerprint_documents([astuple(document) for document in documents]),
    )


def _answer(found: Sequence[Likelihood]) -> tuple[int, float]:
    """Return the preferred choice and by how much it won; of a single continuation, whether it is the greedy one."""
    if len(found) == 1:
        return int(found[0].is_greedy), found[0].gap
    values = [likelihood.log_likelihood for likelihood in found]
    best, second = sorted(values, reverse=True)[:2]
    return values.index(best), best - second


def _others(passages: Sequence[str], index: int, draw: random.Random) -> list[str] | None:
    """Draw passages that differ from the true one and from each other; None where the text has too few."""
    others: list[str] = []
    for _ in range(8 * CHOICES):
        other = passages[draw.randrange(len(passages))]
        if other not in (passages[index], *others):
            others.append(other)
        if len(others) == CHOICES - 1:
            return others
    return None


def _repetitions(piece: str) -> Iterator[tuple[str, str]]:
    """Yield contexts and the words after them, in the second half of a piece, that the context holds already."""
    for match in _WORD.finditer(piece, len(piece) // 2):
        context = piece[: match.start()]
        if re.search(rf"\b{match.group().strip()}\b", context):
            yield context, match.group()


def _is_plain(text: str) -> bool:
    return "\N{REPLACEMENT CHARACTER}" not in text  # a character that was cut between two pieces


@dataclass(frozen=True)
class PublishedTask:
    """A task, tag or group that lm-eval (the extra `eval`) defines and scores."""

    name: str
    """lm-eval's own name."""
    folder: str | None = None
    """Folder of its definition inside lm-eval's `tasks`; None looks through all of them, which takes seconds."""
    split: str = "test"
    """The split that it is scored on."""
    columns: tuple[str, ...] = ()
    """What each of its rows must hold; by default what the first one holds."""
    adapt: Callable[[Row], Row] = dict
    """Brings rows of other editions into the form that lm-eval reads."""
    num_fewshot: int | None = None
    """Examples in front of each document; None is as many as its definition says."""

    @property
    def help(self) -> str:
        return f"lm-eval's task, scored on its {self.split} split"

    def prepare(self, text: HeldOut, limit: int | None, local_data: Path | None) -> ScoreTask | None:
        if importlib.util.find_spec("lm_eval") is None:
            raise ConfigError(
                f"evaluation.tasks: {self.name} needs lm-eval, which is not installed; pip install -e '.[eval]'"
            )
        from src.evaluation.definitions import load_task  # imports lm-eval
        from src.evaluation.harness import score_task

        return partial(score_task, load_task(self, local_data), limit=limit)


def read_rows(folder: Path, task: PublishedTask, limit: int | None = None) -> list[Row]:
    """Read the rows of a task's split from `<folder>/<task>.<split>.jsonl` or `.jsonl.gz`.

    Raises:
        DataError: the folder, the task's file or its split is missing, or a row is not one of the task's.
    """
    path, rows = find_rows(folder, task), list[Row]()
    with open_file(path) as opened:
        for number, line in enumerate(itertools.islice(opened.data, limit), start=1):
            if line.strip():
                rows.append(_parse(line, f"{path}, line {number}", task, rows[0] if rows else {}))
    if not rows:
        raise DataError(f"{path}: no rows; task {task.name} needs {_columns(task, {})} in each line")
    return rows


def find_rows(folder: Path, task: PublishedTask, use: str = "is scored on") -> Path:
    """Return the file of a task's split, which it has a use for; DataError says which one is missing."""
    name, split = task.name, task.split
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of evaluation data; name one that holds {name}.{split}.jsonl")
    for ending in _ENDINGS:
        if (path := folder / f"{name}.{split}{ending}").is_file():
            return path
    other = sorted(path.name for path in folder.glob(f"{glob.escape(name)}.*") if path.name.endswith(_ENDINGS))
    if other:
        raise DataError(
            f"{folder}: holds {', '.join(other)}, but task {name} {use} its {split} split; "
            f"add {name}.{split}.jsonl, or .jsonl.gz"
        )
    raise DataError(f"{folder}: no file for task {name}; add {name}.{split}.jsonl, or .jsonl.gz")


def _parse(line: bytes, where: str, task: PublishedTask, first: Row) -> Row:
    try:
        row = json.loads(line.decode())
        json.dumps(row, ensure_ascii=False).encode()  # fails on half a surrogate pair
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, too long a number, too deep
        reason = str(error).partition(";")[0]  # without the library's advice
        raise DataError(f"{where}: not JSON ({reason}); each line must be one object") from error
    row = task.adapt(row) if isinstance(row, dict) else {}
    missing = [column for column in task.columns or first if column not in row]
    if missing or not row:
        found = f"no {missing[0]!r}" if missing else "not an object with keys"
        raise DataError(f"{where}: {found}; task {task.name} needs {_columns(task, first)}")
    return row


def _columns(task: PublishedTask, first: Row) -> str:
    return ", ".join(task.columns or first) or "an object"


def _boolq(row: Row) -> Row:
    """Google's own files say `answer: true` where SuperGLUE's say `label: 1`."""
    return row if "label" in row or "answer" not in row else {**row, "label": int(row["answer"])}


def _race(row: Row) -> Row:
    """lm-eval reads the problems of an article as a Python literal."""
    problems = row.get("problems")
    return row if problems is None or isinstance(problems, str) else {**row, "problems": repr(problems)}


register_task(GeneratedTask("next_passage", "which of four passages continues the held-out text", next_passage))
register_task(GeneratedTask("repeated_word", "complete held-out text with a word that occurred before", repeated_word))
for published in (
    PublishedTask("arc_challenge", "arc", "test", ("question", "choices", "answerKey")),
    PublishedTask("arc_easy", "arc", "test", ("question", "choices", "answerKey")),
    PublishedTask("boolq", "super_glue/boolq", "validation", ("passage", "question", "label"), adapt=_boolq),
    PublishedTask("hellaswag", "hellaswag", "validation", ("activity_label", "ctx_a", "ctx_b", "endings", "label")),
    PublishedTask("lambada_openai", "lambada", "test", ("text",)),
    PublishedTask("piqa", "piqa", "validation", ("goal", "sol1", "sol2", "label")),
    PublishedTask("race", "race", "test", ("article", "problems"), adapt=_race),
    PublishedTask(
        "social_iqa", "siqa", "validation", ("context", "question", "answerA", "answerB", "answerC", "label")
    ),
):
    register_task(published)
