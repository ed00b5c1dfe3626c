"""Tasks: what those of held-out text ask, how answers are scored, rows of published ones, and one defined elsewhere."""

import codecs
import gzip
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest

from src.config import load_run_config
from src.errors import ConfigError, DataError
from src.evaluation.config import EvaluationConfig
from src.evaluation.held_out import HeldOut, held_out_of_run
from src.evaluation.likelihood import Likelihood, Request, TextModel
from src.evaluation.tasks import (
    PublishedTask,
    TaskDocument,
    find_task,
    next_passage,
    read_rows,
    repeated_word,
    score_documents,
)
from src.run_directory import RunDirectory
from src.train import RunResult
from tests.evaluation.published_rows import PUBLISHED, write_rows


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
    documents = [TaskDocument("a", ("b", "c"), 1), TaskDocument("d", ("e", "f"), 1)]
    values = [-3.0, -2.0, -1.0, -1.5]
    scripted = _Scripted([Likelihood(value, is_greedy=False, gap=9) for value in values])
    score = score_documents("choose", documents, cast(TextModel, scripted))
    assert score.values == {"acc": [1, 0], "log_likelihood": [-2.0, -1.5]}
    assert score.predictions == [1, 0]
    assert score.gaps == [1.0, 0.5]


def test_a_completion_is_right_when_it_is_the_greedy_one() -> None:
    documents = [TaskDocument("a", ("b",), 0), TaskDocument("c", ("d",), 0)]
    scripted = _Scripted([Likelihood(-1, is_greedy=True, gap=0.3), Likelihood(-2, is_greedy=False, gap=0.1)])
    score = score_documents("complete", documents, cast(TextModel, scripted))
    assert score.values["acc"] == [1, 0]
    assert (score.predictions, score.gaps) == ([1, 0], [0.3, 0.1])


def test_an_unknown_task_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown task 'next_pasage'; did you mean 'next_passage'\? Known: arc_"):
        EvaluationConfig(tasks=["next_pasage"])


def test_names_of_lm_eval_are_accepted_without_importing_it() -> None:
    names = ["sciq", "mmlu", "mmlu_stem_tasks"]
    assert EvaluationConfig(tasks=names, num_fewshot=5).tasks == names
    script = f"import sys; from src.evaluation.config import EvaluationConfig as C; C(tasks={names})"
    code = f"{script}; sys.exit('lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(ConfigError, match=r"evaluation.num_fewshot: -1, but it must be at least 0"):
        EvaluationConfig(num_fewshot=-1)


def test_without_lm_eval_configs_that_name_its_tasks_are_read(text: HeldOut, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.evaluation.tasks.harness_names", frozenset[str])
    assert EvaluationConfig(tasks=["sciq", "next_passage"]).tasks == ["sciq", "next_passage"]
    with pytest.raises(ConfigError, match=r"unknown task 'repeatd_word'; did you mean 'repeated_word'"):
        EvaluationConfig(tasks=["repeatd_word"])
    monkeypatch.setattr(importlib.util, "find_spec", {}.get)
    for name in ("sciq", "mmlu"):
        with pytest.raises(
            ConfigError, match=rf"evaluation.tasks: {name} needs lm-eval, .*; pip install -e '.\[eval\]'"
        ):
            find_task(name).prepare(text, None, None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "evals")
    return tmp_path / "evals"


def test_all_eight_are_read_compressed_or_not(folder: Path) -> None:
    assert len(PUBLISHED) == 8
    for name, task in PUBLISHED.items():
        rows = read_rows(folder, task)
        assert len(rows) == (3 if name == "race" else 50)
        assert set(rows[0]) >= set(task.columns)
    assert len(read_rows(folder, PUBLISHED["piqa"], limit=7)) == 7


def test_other_forms_of_the_same_rows_are_understood(folder: Path) -> None:
    assert [row["label"] for row in read_rows(folder, PUBLISHED["boolq"], limit=3)] == [1, 0, 1]
    problems = read_rows(folder, PUBLISHED["race"])[0]["problems"]
    assert isinstance(problems, str)
    assert "'answer': 'A'" in problems


def test_a_missing_folder_file_and_split_are_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such folder of evaluation data; .* race.test.jsonl"):
        read_rows(Path("nowhere"), PUBLISHED["race"])
    (folder / "race.test.jsonl").unlink()
    with pytest.raises(DataError, match=r"evals: no file for task race; add race.test.jsonl, or .jsonl.gz"):
        read_rows(folder, PUBLISHED["race"])
    (folder / "arc_easy.test.jsonl.gz").rename(folder / "arc_easy.validation.jsonl.gz")
    expected = r"holds arc_easy.validation.jsonl.gz, but task arc_easy is scored on its test split; add arc_easy.test"
    with pytest.raises(DataError, match=expected):
        read_rows(folder, PUBLISHED["arc_easy"])


def test_damaged_rows_are_named(folder: Path) -> None:
    path = folder / "piqa.validation.jsonl"
    whole = path.read_text().splitlines()
    path.write_text("\n".join([whole[0], json.dumps({"goal": "x", "sol1": "y"})]))
    with pytest.raises(DataError, match=r"piqa.validation.jsonl, line 2: no 'sol2'; task piqa needs goal, sol1, sol2"):
        read_rows(folder, PUBLISHED["piqa"])
    path.write_text(whole[0] + "\n{")
    with pytest.raises(DataError, match=r"piqa.validation.jsonl, line 2: not JSON"):
        read_rows(folder, PUBLISHED["piqa"])
    path.write_text("")
    with pytest.raises(DataError, match=r"piqa.validation.jsonl: no rows"):
        read_rows(folder, PUBLISHED["piqa"])


def test_empty_lines_are_no_rows(folder: Path) -> None:
    path = folder / "piqa.validation.jsonl"
    path.write_text("\n".join(["", path.read_text(), "", " "]))
    assert len(read_rows(folder, PUBLISHED["piqa"])) == 50


def test_rows_of_any_task_have_the_keys_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "a[b].test.jsonl"
    for row, found in (({"x": 1}, "no 'y'"), ([1], "no 'x'")):
        path.write_text(json.dumps({"x": 1, "y": 2}) + "\n" + json.dumps(row))
        with pytest.raises(DataError, match=rf"line 2: {found}; task a\[b\] needs x, y"):
            read_rows(tmp_path, PublishedTask("a[b]"))
    path.write_text("3")
    with pytest.raises(DataError, match="line 1: not an object with keys"):
        read_rows(tmp_path, PublishedTask("a[b]"))


@pytest.mark.parametrize("name", ["piqa.validation.jsonl", "arc_easy.test.jsonl.gz"])
def test_a_byte_order_mark_is_no_part_of_the_rows(name: str, folder: Path) -> None:
    task, path = PUBLISHED[name.partition(".")[0]], folder / name
    whole, packed = read_rows(folder, task), name.endswith(".gz")
    marked = codecs.BOM_UTF8 + (gzip.decompress(path.read_bytes()) if packed else path.read_bytes())
    path.write_bytes(gzip.compress(marked) if packed else marked)
    assert read_rows(folder, task) == whole


UNREADABLE = {
    "a long number": b'{"goal": %s}' % (b"9" * 5000),
    "deep nesting": b'{"goal": %s}' % (b"[" * 100_000),
    "bytes that are no UTF-8": b'{"goal": "\xff\xfe"}',
    "half a surrogate pair": b'{"goal": "\\ud800"}',
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_rows_that_no_library_can_read_are_named(kind: str, folder: Path) -> None:
    path = folder / "piqa.validation.jsonl"
    path.write_bytes(path.read_bytes().splitlines()[0] + b"\n" + UNREADABLE[kind])
    with pytest.raises(
        DataError, match=r"piqa.validation.jsonl, line 2: not JSON \([^;]+\); each line must be one obj"
    ):
        read_rows(folder, PUBLISHED["piqa"])


def test_a_damaged_file_is_named(folder: Path) -> None:
    path = folder / "arc_easy.test.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"arc_easy.test.jsonl.gz: damaged or cut off"):
        read_rows(folder, PUBLISHED["arc_easy"])


def test_a_task_that_needs_the_extra_says_so(text: HeldOut, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: str) -> None:
        return None

    monkeypatch.setattr(importlib.util, "find_spec", none)
    with pytest.raises(
        ConfigError, match=r"evaluation.tasks: piqa needs lm-eval, which is not installed; pip install -e '.\[eval\]'"
    ):
        find_task("piqa").prepare(text, None, None)
