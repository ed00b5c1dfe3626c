"""The adapter to lm-eval (the extra `eval`): its prompts, metrics and aggregation, with our models.

Like `definitions`, this imports lm-eval, which takes seconds: import it inside functions.
"""

import contextlib
import math
import os
import sys
from collections.abc import Generator, Iterator, Sequence
from numbers import Real
from typing import Any

import numpy as np
from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports] - an extra
from lm_eval.evaluator import evaluate  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import normalize_gen_kwargs  # pyright: ignore[reportMissingImports]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]

from src.errors import DataError
from src.evaluation.completion import Prompt, Stopping, complete, new_tokens
from src.evaluation.definitions import LoadedTask, draw_examples
from src.evaluation.likelihood import Request, TextModel
from src.evaluation.results import TaskScore, fingerprint_documents
from src.inference.generation import Sampling
from src.system.console import print_note

BOOTSTRAP_SAMPLES = 1000
"""For standard errors of metrics that are no means, such as perplexity or F1."""


class HarnessModel(LM):  # pyright: ignore[reportUntypedBaseClass]
    """A `TextModel` as lm-eval sees it.

    lm-eval sees a single rank: every rank builds all requests, and `TextModel` distributes and gathers them.
    """

    def __init__(self, model: TextModel, name: str = "tasks") -> None:
        super().__init__()
        self.model, self.name = model, name
        self.gaps: dict[tuple[str, str], float] = {}
        """`Likelihood.gap` by context and continuation, which lm-eval does not keep."""
        self.is_computing = False
        """While the model computes; whatever fails at other times is the task's."""

    @contextlib.contextmanager
    def _computing(self) -> Generator[None]:
        self.is_computing = True
        yield
        self.is_computing = False  # not where it failed

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = [self.model.encode_pair(*request.args) for request in requests]
        with self._computing():
            likelihoods = self.model.log_likelihoods(pairs, self.name)
        for request, found in zip(requests, likelihoods, strict=True):
            self.gaps[request.args] = found.gap
        return [(found.log_likelihood, found.is_greedy) for found in likelihoods]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, cut into windows where they are too long."""
        owners: list[int] = []
        pairs: list[Request] = []
        for index, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.model.encode(request.args[0]), self.model.start_of_text, self.model.max_length, context_len=1
            )
            for window in map(make_disjoint_window, windows):
                owners.append(index)
                pairs.append(Request(*window))
        totals = [0.0] * len(requests)
        with self._computing():
            for owner, found in zip(owners, self.model.log_likelihoods(pairs, self.name), strict=True):
                totals[owner] += found.log_likelihood
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        prompts = [Prompt(request.args[0], _stopping(request.args[1])) for request in requests]
        for stopping in dict.fromkeys(prompt.stopping for prompt in prompts):
            if (room := new_tokens(self.model, stopping)) < stopping.max_new_tokens:
                wanted = f"answers of up to {stopping.max_new_tokens} tokens"
                print_note(f"{self.name}: {wanted} end after {room}, as the context has {self.model.max_length}")
        with self._computing():
            return complete(self.model, prompts, self.name)


def _stopping(options: dict[str, Any]) -> Stopping:
    given: dict[str, Any] = dict(normalize_gen_kwargs(options))
    temperature = float(given["temperature"]) if given["do_sample"] else 0.0
    return Stopping(
        until=tuple(given["until"]),
        max_new_tokens=int(given["max_gen_toks"]),
        sampling=Sampling(temperature=temperature, top_k=given.get("top_k") or None, top_p=given.get("top_p")),
    )


def score_task(loaded: LoadedTask, model: TextModel, limit: int | None = None) -> list[TaskScore]:
    """Score what was loaded, at most `limit` documents of each task; groups follow after their tasks.

    Raises:
        DataError: rows are not what the task's definition expects.
    """
    adapter = HarnessModel(model, ", ".join(loaded["groups"] or loaded["tasks"]))
    draw_examples(loaded)
    os.environ["DISABLE_MULTIPROC"] = "1"  # lm-eval would fork this process, with its model and threads, to bootstrap
    try:
        with contextlib.redirect_stdout(sys.stderr):
            found: Any = evaluate(adapter, loaded, limit=limit, bootstrap_iters=BOOTSTRAP_SAMPLES)
    except Exception as error:
        if adapter.is_computing:
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise DataError(f"task {adapter.name}: lm-eval cannot score its rows ({reason}); check them") from error
    assert found is not None  # it is None on ranks that lm-eval knows to be above 0
    scores = [_score(name, found, adapter.gaps) for name in (*loaded["tasks"], *loaded["groups"])]
    return [score for score in scores if score.scores]  # some groups only name tasks


def _score(name: str, found: Any, gaps: dict[tuple[str, str], float]) -> TaskScore:
    """Translate lm-eval's results of a task or group, and its record of each document."""
    results: dict[str, Any] = found["results"][name]
    samples = sorted(found.get("samples", {}).get(name, []), key=lambda sample: sample["doc_id"])
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    first = [sample for sample in samples if sample["filter"] == filters[0]]
    answers = [answer for sample in first if (answer := _answer(sample, gaps)) is not None]
    scores = {key: float(value) for key, value in results.items() if "," in key and isinstance(value, Real)}
    about = {"num_fewshot": found["n-shot"].get(name), "version": str(found["versions"].get(name))}
    return TaskScore(
        task=name,
        values={
            metric: values
            for each in filters
            for metric, values in _values([sample for sample in samples if sample["filter"] == each], each)
        },
        predictions=[answer for answer, _ in answers] if len(answers) == len(first) else [],
        gaps=[gap for _, gap in answers] if len(answers) == len(first) else [],
        fingerprint=fingerprint_documents([(sample["arguments"], sample["target"]) for sample in first]),
        scores={_metric(*key.split(",")): value for key, value in scores.items() if "_stderr," not in key},
        errors={_metric(*key.split(",")).replace("_stderr", ""): v for key, v in scores.items() if "_stderr," in key},
        documents=results.get("sample_len", 0),
        about={key: value for key, value in about.items() if value is not None},
    )


def _metric(name: str, of_filter: str) -> str:
    return name if of_filter == "none" else f"{name},{of_filter}"


def _values(samples: Sequence[dict[str, Any]], of_filter: str) -> Iterator[tuple[str, list[float]]]:
    """Yield each metric that is a number in each document; of pairs with a log-likelihood, that."""
    for metric in samples[0]["metrics"]:
        values: list[Any] = [sample.get(metric) for sample in samples]
        if all(isinstance(value, Real | np.bool_) for value in values):
            # what lm-eval keeps per document under the name of perplexity
            yield _metric("log_likelihood" if metric == "perplexity" else metric, of_filter), list(map(float, values))
        elif metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
            yield _metric("log_likelihood", of_filter), [float(value[0]) for value in values]


def _answer(sample: dict[str, Any], gaps: dict[tuple[str, str], float]) -> tuple[int | str, float] | None:
    """Return the preferred choice and by how much it won; of a single continuation, whether it is the greedy one.

    Of a text that was written, return that; None where nothing is predicted.
    """
    responses = sample["filtered_resps"]
    if all(isinstance(response, str) for response in responses):
        return responses[0], math.inf
    if not all(isinstance(response, tuple) for response in responses):
        return None
    if len(responses) == 1:
        return int(responses[0][1]), gaps[tuple(sample["arguments"][0])]
    contexts = [arguments[0] for arguments in sample["arguments"]]
    # without a context, choices are asked for a second time, to be compared with
    values = [
        float(value) for (value, _), context in zip(responses, contexts, strict=True) if context or not contexts[0]
    ]
    best, second = sorted(values, reverse=True)[:2]
    return values.index(best), best - second
