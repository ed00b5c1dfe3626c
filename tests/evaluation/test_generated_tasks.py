"""Tasks made of held-out text: what they ask, and that answers are scored as they should be."""

from collections.abc import Sequence
from typing import cast

import pytest

from src.config import load_run_config
from src.errors import ConfigError
from src.evaluation.config import EvaluationConfig
from src.evaluation.generated_tasks import Document, next_passage, repeated_word, score_documents
from src.evaluation.held_out import HeldOut, held_out_of_run
from src.evaluation.likelihood import Likelihood, Request, TextModel
from src.evaluation.suite import prepare_suite
from src.run_directory import RunDirectory
from src.train import RunResult


@pytest.fixture(scope="module")
def text(trained: RunResult) -> HeldOut:
    run = RunDirectory(trained.run_dir)
    return held_out_of_run(run, load_run_config(run).data)[0]


def test_the_true_passage_continues_the_text_and_the_others_do_not(text: HeldOut) -> None:
    whole = text.tokenizer.decode_batch(text.windows.tolist())
    documents = next_passage(text, 40)
    assert len(documents) == 40
    assert documents == next_passage(text, 40)
    assert {document.target for document in documents} == {0, 1, 2, 3}
    for document in documents:
        assert len(set(document.choices)) == 4
        follows = [any(document.context + choice in window for window in whole) for choice in document.choices]
        assert follows == [index == document.target for index in range(4)]


def test_the_missing_word_was_there_before(text: HeldOut) -> None:
    documents = repeated_word(text, 20)
    assert len(documents) >= 10
    for document in documents:
        (word,) = document.choices
        assert word.startswith(" ")
        assert word[1:] in document.context
        assert any(document.context + word in window for window in text.tokenizer.decode_batch(text.windows.tolist()))


class _Scripted:
    """Answers requests from a list."""

    def __init__(self, answers: Sequence[Likelihood]) -> None:
        self.answers = list(answers)

    def encode_pair(self, context: str, continuation: str) -> Request:
        return Request([0], [0])

    def log_likelihoods(self, requests: Sequence[Request], description: str) -> list[Likelihood]:
        return self.answers[: len(requests)]


def test_the_likeliest_choice_is_the_answer() -> None:
    documents = [Document("a", ("b", "c"), 1), Document("d", ("e", "f"), 1)]
    values = [-3.0, -2.0, -1.0, -1.5]
    scripted = _Scripted([Likelihood(value, is_greedy=False, gap=9) for value in values])
    score = score_documents("choose", documents, cast(TextModel, scripted))
    assert score.values == {"acc": [1, 0], "log_likelihood": [-2.0, -1.5]}
    assert score.predictions == [1, 0]
    assert score.gaps == [1.0, 0.5]


def test_a_completion_is_right_when_it_is_the_greedy_one() -> None:
    documents = [Document("a", ("b",), 0), Document("c", ("d",), 0)]
    scripted = _Scripted([Likelihood(-1, is_greedy=True, gap=0.3), Likelihood(-2, is_greedy=False, gap=0.1)])
    score = score_documents("complete", documents, cast(TextModel, scripted))
    assert score.values["acc"] == [1, 0]
    assert (score.predictions, score.gaps) == ([1, 0], [0.3, 0.1])


def test_an_unknown_task_is_named_with_the_nearest(text: HeldOut) -> None:
    with pytest.raises(ConfigError, match=r"unknown task 'next_pasage'; did you mean 'next_passage'\? Known: arc_"):
        prepare_suite(text, EvaluationConfig(tasks=["next_pasage"]))
