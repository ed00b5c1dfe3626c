"""The adapter to lm-eval (the extra `eval`): its task definitions, prompts and metrics, with our models.

The only module that imports lm-eval, which takes seconds: import this one inside functions.
"""

import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval  # pyright: ignore[reportMissingImports] - an extra
import yaml
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.evaluator import evaluate  # pyright: ignore[reportMissingImports]
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]

from src.errors import ConfigError
from src.evaluation.likelihood import Request, TextModel
from src.evaluation.results import TaskScore, fingerprint_documents
from src.evaluation.tasks import PublishedTask, read_rows

LoadedTask = dict[str, Any]
"""A task as lm-eval loads it."""


class HarnessModel(TemplateLM):  # pyright: ignore[reportUntypedBaseClass]
    """A `TextModel` as lm-eval sees it.

    lm-eval sees a single rank: every rank builds all requests, and `TextModel` distributes and gathers them.
    """

    def __init__(self, model: TextModel) -> None:
        super().__init__()
        self.model = model
        self.gaps: dict[tuple[str, str], float] = {}
        """`Likelihood.gap` by context and continuation, which lm-eval does not keep."""

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.model.end_of_text

    @property
    def prefix_token_id(self) -> int:
        """The id that stands in front of a text without context."""
        return self.model.start_of_text

    @property
    def max_length(self) -> int:
        return self.model.max_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.model.encode(string) if add_special_tokens is False else self.model.prompt(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [Request(context, continuation) for _, context, continuation in requests]
        likelihoods = self.model.log_likelihoods(pairs, "scoring tasks")
        for (texts, *_), found in zip(requests, likelihoods, strict=True):
            self.gaps[texts] = found.gap
        return [(found.log_likelihood, found.is_greedy) for found in likelihoods]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, cut into windows where they are too long."""
        owners: list[int] = []
        pairs: list[Request] = []
        for index, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.model.encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            for window in map(make_disjoint_window, windows):
                owners.append(index)
                pairs.append(Request(*window))
        totals = [0.0] * len(requests)
        for owner, found in zip(owners, self.model.log_likelihoods(pairs, "scoring texts"), strict=True):
            totals[owner] += found.log_likelihood
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        raise ConfigError("evaluation.tasks: tasks that generate text are not supported; choose others")


def load_task(task: PublishedTask, local_data: Path | None, limit: int | None = None) -> LoadedTask:
    """Load a task with its data, from a folder (see `read_rows`) or from the Hugging Face hub.

    Raises:
        DataError: a file in `local_data` is missing or is not the task's.
    """
    definition: dict[str, Any] = {"include": str(Path(str(lm_eval.__file__)).parent / "tasks" / task.definition)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if local_data is not None:
            definition |= _local_data(task, read_rows(local_data, task, limit), folder)
        (folder / "task.yaml").write_text(yaml.safe_dump({**definition, "task": task.name}), encoding="utf-8")
        manager: Any = TaskManager(include_path=name, include_defaults=False)
        return manager.load([task.name])


def score_task(loaded: LoadedTask, model: TextModel, limit: int | None = None) -> TaskScore:
    """Score a loaded task, at most `limit` documents of it."""
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    adapter = HarnessModel(model)
    found: Any = evaluate(adapter, loaded, limit=limit, bootstrap_iters=0)
    assert found is not None  # it is None on ranks that lm-eval knows to be above 0
    (name,) = loaded["tasks"]
    return _task_score(name, found["samples"][name], adapter.gaps)


def _local_data(task: PublishedTask, rows: Sequence[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Write rows as a file that `datasets` can read, and return the keys of the task's definition that point to it."""
    split, path = task.split, folder / f"{task.name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(path)},
            "cache_dir": str(folder / "cache"),
            "keep_in_memory": True,
        },
        "training_split": None,
        "validation_split": split if split == "validation" else None,
        "test_split": split if split == "test" else None,
    }


def _task_score(name: str, samples: Sequence[dict[str, Any]], gaps: dict[tuple[str, str], float]) -> TaskScore:
    """Translate lm-eval's record of each document."""
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    answers = [_answer(sample, gaps) for sample in ordered]
    names = {"perplexity": "log_likelihood"}  # what lm-eval keeps per document under that name
    return TaskScore(
        task=name,
        values={
            str(names.get(metric, metric)): [float(sample[metric]) for sample in ordered]
            for metric in ordered[0]["metrics"]
        },
        predictions=[answer for answer, _ in answers],
        gaps=[gap for _, gap in answers],
        fingerprint=fingerprint_documents([(sample["arguments"], sample["target"]) for sample in ordered]),
    )


def _answer(sample: dict[str, Any], gaps: dict[tuple[str, str], float]) -> tuple[int, float]:
    """Return the preferred choice and by how much it won; of a single continuation, whether it is the greedy one."""
    responses = sample["filtered_resps"]
    if len(responses) == 1:
        return int(responses[0][1]), gaps[tuple(sample["arguments"][0])]
    values = [float(value) for value, _ in responses]
    best, second = sorted(values, reverse=True)[:2]
    return values.index(best), best - second
