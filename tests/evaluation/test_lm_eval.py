"""Tasks, tags and groups of lm-eval by name: one of each output type on hand-made rows, and what is named before.

Needs the extra `eval`.
"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

from src import evaluate
from src.config import load_run_config
from src.data.tokenizer import num_ids
from src.errors import ConfigError, DataError, UserError
from src.evaluation.completion import Prompt, Stopping, complete
from src.evaluation.definitions import load_task
from src.evaluation.harness import score_task
from src.evaluation.held_out import held_out_of_run
from src.evaluation.likelihood import TextModel
from src.evaluation.results import TaskScore, read_scores
from src.evaluation.tasks import PublishedTask, find_task, harness_names
from src.inference import InferenceModel, generate, load_model
from src.inference.generation import Sampling
from src.run_directory import RunDirectory
from src.system.console import no_progress
from src.train import RunResult, train
from tests.conftest import small_config
from tests.evaluation.harness_rows import gsm8k, mmlu, sciq, wikitext, write

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write(folder, "sciq.test.jsonl.gz", sciq(9))
    write(folder, "wikitext.test.jsonl", wikitext(4))
    write(folder, "gsm8k.test.jsonl", gsm8k(0, 4))
    write(folder, "gsm8k.train.jsonl", gsm8k(10, 6))
    write(
        folder, "lambada_openai.test.jsonl", [{"text": f"the owl hoots and the owl number {n} hoots"} for n in range(5)]
    )
    write(folder, "mmlu_anatomy.test.jsonl", mmlu(0, 3))
    write(folder, "mmlu_astronomy.test.jsonl", mmlu(10, 7))
    write(folder, "mmlu_astronomy.dev.jsonl", mmlu(20, 5))
    write(folder, "mmlu_anatomy.dev.jsonl.gz", mmlu(30, 5))
    return folder


@pytest.fixture(scope="module")
def model(trained: RunResult) -> InferenceModel:
    return load_model(trained.run_dir, experts="ffn")


@pytest.fixture(scope="module")
def texts(trained: RunResult, model: InferenceModel) -> TextModel:
    run = RunDirectory(trained.run_dir)
    rule = held_out_of_run(run, load_run_config(run).data)[0].rule
    return TextModel(model, rule, max_length=128, batch_tokens=1024, progress=no_progress)


def loaded(name: str, folder: Path, num_fewshot: int | None = None) -> dict[str, Any]:
    task = find_task(name, num_fewshot)
    assert isinstance(task, PublishedTask)
    return load_task(task, folder)


def scores_of(name: str, folder: Path, texts: TextModel, num_fewshot: int | None = None) -> dict[str, TaskScore]:
    return {score.task: score for score in score_task(loaded(name, folder, num_fewshot), texts)}


def log_likelihood(texts: TextModel, context: str, continuation: str) -> float:
    """Score a continuation in one pass over the whole text, without batches."""
    start, ids = len(texts.encode(context)), texts.encode(context + continuation)
    (model,) = [texts.model]
    assert isinstance(model, InferenceModel)
    log_probs = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
    return sum(float(log_probs[place - 1, ids[place]]) for place in range(start, len(ids)))


def test_multiple_choice(folder: Path, texts: TextModel) -> None:
    (score,) = score_task(loaded("sciq", folder), texts)
    for number, row in enumerate(sciq(9)):
        choices = [row[key] for key in ("distractor1", "distractor2", "distractor3", "correct_answer")]
        context = f"{row['support']}\nQuestion: {row['question']}\nAnswer:"
        values = [log_likelihood(texts, context, f" {choice}") for choice in choices]
        assert score.predictions[number] == values.index(max(values))
        assert score.values["acc"][number] == (values.index(max(values)) == 3)
    assert score.scores["acc"] == pytest.approx(score.mean("acc"))
    deviation = math.sqrt(score.mean("acc") * (1 - score.mean("acc")) / 8)
    assert score.errors["acc"] == pytest.approx(deviation)
    assert (score.num_documents, score.about) == (9, {"num_fewshot": 0, "version": "1.0"})


def test_single_continuations(folder: Path, texts: TextModel) -> None:
    (score,) = score_task(loaded("lambada_openai", folder), texts)
    expected = [log_likelihood(texts, f"the owl hoots and the owl number {n}", " hoots") for n in range(5)]
    assert score.values["log_likelihood"] == pytest.approx(expected, abs=1e-4)
    assert score.scores["perplexity"] == pytest.approx(math.exp(-sum(expected) / 5), rel=1e-4)
    assert score.errors["perplexity"] > 0
    assert set(score.figures()) == {"log_likelihood", "acc", "perplexity"}


def test_whole_texts_are_aggregated_by_words_and_bytes(folder: Path, texts: TextModel) -> None:
    (score,) = score_task(loaded("wikitext", folder), texts)
    pages = [row["page"] for row in wikitext(4)]
    total, words = sum(score.values["log_likelihood"]), sum(len(re.split(r"\s+", page)) for page in pages)
    num_bytes = sum(len(page.encode()) for page in pages)
    assert score.scores["word_perplexity"] == pytest.approx(math.exp(-total / words))
    assert score.scores["byte_perplexity"] == pytest.approx(math.exp(-total / num_bytes))
    assert score.scores["bits_per_byte"] == pytest.approx(-total / num_bytes / math.log(2))
    first = pages[0].replace(" @.@ ", ".").replace(" , ", ", ").replace(" . ", ". ").replace(" \n", "\n")
    ids = [texts.end_of_text, *texts.encode(first.replace("\n ", "\n"))]
    assert isinstance(texts.model, InferenceModel)
    log_probs = texts.model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
    expected = sum(float(log_probs[place - 1, ids[place]]) for place in range(1, len(ids)))
    assert score.values["log_likelihood"][0] == pytest.approx(expected, rel=1e-4)
    assert (score.predictions, score.num_documents) == ([], 4)


def test_written_answers(folder: Path, texts: TextModel, capsys: pytest.CaptureFixture[str]) -> None:
    """Greedy, after examples of the training split; each answer is the one that the prompt alone gets."""
    tasks = loaded("gsm8k", folder, 2)
    (score,) = score_task(tasks, texts)
    assert "answers of up to 256 tokens end after 64, as the context has 128" in capsys.readouterr().err
    assert set(score.scores) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    assert (score.about["num_fewshot"], score.num_documents) == (2, 4)
    for instance in tasks["tasks"]["gsm8k"].instances:
        prompt = instance.args[0]
        assert prompt.count("#### ") == 2
        assert prompt.startswith("Question: Kim has 1")  # an example; the documents' numbers have one digit
        assert prompt.endswith(f"Question: {gsm8k(0, 4)[instance.doc_id]['question']}\nAnswer:")
        (answer,) = instance.resps
        assert answer == greedy(texts, prompt, 64).partition("Question:")[0]


def greedy(texts: TextModel, prompt: str, new_tokens: int) -> str:
    assert isinstance(texts.model, InferenceModel)
    ids = texts.encode(prompt)[-(128 - new_tokens) :]
    found = generate(
        texts.model,
        torch.tensor([ids]),
        max_new_tokens=new_tokens,
        stop_ids=[texts.end_of_text],
        num_ids=num_ids(texts.rule.tokenizer),
    )
    return texts.tokenizer.decode(found[0, len(ids) :].tolist())


@pytest.mark.parametrize("batch_tokens", [1, 200, 4096])
def test_texts_end_in_front_of_the_first_stop_string(texts: TextModel, batch_tokens: int) -> None:
    model = TextModel(texts.model, texts.rule, max_length=128, batch_tokens=batch_tokens)
    prompts = ["import", "def main(self, name):\n    return", "class A:\n    x = 1\n", "", "for"]
    whole = [
        greedy(texts, prompt or texts.tokenizer.decode([0], skip_special_tokens=False), 20) for prompt in prompts[:3]
    ]
    stops = tuple({text[4:6] for text in whole} | {text[9:12] for text in whole if len(text) > 11})
    stopping = Stopping(until=stops, max_new_tokens=20, sampling=Sampling())
    short = Stopping(until=(), max_new_tokens=3, sampling=Sampling())
    found = complete(model, [Prompt(text, stopping) for text in prompts] + [Prompt("import", short)], "test")
    for text, answer in zip(whole, found, strict=False):
        assert answer == text[: min(text.index(stop) for stop in stops if stop in text)]
        assert len(answer) < len(text)
    assert found[-1] == greedy(texts, "import", 3)


def test_a_group_is_aggregated_over_its_tasks(
    folder: Path, texts: TextModel, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = scores_of("mmlu", folder, texts)
    note = capsys.readouterr().err
    assert "55 of 57 tasks, which are left out: mmlu_abstract_algebra" in note
    assert set(scores) == {"mmlu_anatomy", "mmlu_astronomy", "mmlu_stem", "mmlu"}
    parts = [scores["mmlu_anatomy"], scores["mmlu_astronomy"]]
    hits = [hit for part in parts for hit in part.values["acc"]]
    for name in ("mmlu", "mmlu_stem"):
        assert scores[name].scores["acc"] == pytest.approx(sum(hits) / 10)
        assert scores[name].num_documents == 10
        variance = sum((len(p.values["acc"]) - 1) * p.errors["acc"] ** 2 * len(p.values["acc"]) for p in parts) / 8
        assert scores[name].errors["acc"] == pytest.approx(math.sqrt(variance / 10))
        assert scores[name].about["version"] == "2"
    assert scores_of("mmlu_stem_tasks", folder, texts).keys() == {"mmlu_anatomy", "mmlu_astronomy"}  # a tag
    shots = loaded("mmlu", folder, 5)["tasks"]["mmlu_anatomy"]
    score_task({"tasks": {"mmlu_anatomy": shots}, "groups": {}}, texts)
    assert all(instance.args[0].count("\nAnswer: ") == 5 for instance in shots.instances)


def test_examples_are_the_same_in_each_scoring(folder: Path, texts: TextModel) -> None:
    tasks = loaded("gsm8k", folder, 3)
    prompts = [
        [each.args[0] for each in tasks["tasks"]["gsm8k"].instances] for _ in range(2) if score_task(tasks, texts)
    ]
    assert prompts[0] == prompts[1]
    assert len(set(prompts[0])) == 4


@pytest.mark.release
def test_both_forms_are_compared_on_every_kind(
    trained: RunResult, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.json"
    names = "sciq,lambada_openai,wikitext,gsm8k,mmlu,mmlu_anatomy,next_passage"
    arguments = ["--run", str(trained.run_dir), "--compare", "ffn", "--tasks", names, "--num-fewshot", "1"]
    write(folder, "sciq.train.jsonl", sciq(3))
    write(folder, "wikitext.train.jsonl", wikitext(3))
    evaluate.main([*arguments, "--limit", "3", "--local-data", str(folder), "--json", str(out)])
    printed = capsys.readouterr().out
    results = json.loads(out.read_text())
    assert set(results["tasks"]) == {*names.split(","), "mmlu_astronomy", "mmlu_stem"}
    assert results["tasks"]["gsm8k"]["num_fewshot"] == 1
    assert results["tasks"]["gsm8k"]["version"] == "3.0"
    assert results["tasks"]["mmlu"]["documents"] == 6
    assert "bootstrapping" not in printed
    assert "gsm8k, 1-shot" in " ".join(printed.split())
    compared = {(row["name"], row["metric"]): row for row in results["comparison"]}
    assert compared["wikitext", "log_likelihood"]["changed_predictions"] is None
    assert compared["gsm8k", "exact_match,strict-match"]["changed_predictions"] == 0
    assert compared["sciq", "acc"]["documents"] == 3


def test_training_reports_and_keeps_them(folder: Path, tmp_path: Path, small_overrides: list[str]) -> None:
    settings = ["evaluation.tasks=[sciq,gsm8k]", f"evaluation.local_data={folder}", "evaluation.num_fewshot=0"]
    config = small_config(small_overrides, tmp_path, "trainer.max_steps=2", "evaluation.task_limit=2", *settings)
    run = RunDirectory(train(config).run_dir)
    kept = {task.task: task for task in read_scores(run.scores_path)["lookup_form"].tasks}
    assert kept["gsm8k"].num_documents == kept["sciq"].num_documents == 2
    assert all(isinstance(answer, str) for answer in kept["gsm8k"].predictions)
    report = json.loads((run.path / "report.json").read_text())
    assert report["evaluation"]["lookup_form"]["tasks"]["sciq"]["version"] == "1.0"


NEEDS = {
    "humaneval": "humaneval runs code that the model writes",
    "chartqa": "chartqa has images or sounds",
    "mmmu_val": "mmmu_val_art has images or sounds",
    "squadv2": "squadv2 reads its data by code of its own",
    "ifeval": "needs the Python package langdetect, which is not installed; pip install langdetect",
    "xquad_en": "no file for task xquad_en; add xquad_en.validation.jsonl, or .jsonl.gz",
}


@pytest.mark.parametrize("name", NEEDS)
def test_what_is_missing_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "langdetect", None)
    write(tmp_path, "ifeval.train.jsonl", [{"key": 1, "prompt": "Hi", "instruction_id_list": [], "kwargs": []}])
    with pytest.raises(UserError, match=NEEDS[name]) as caught:
        loaded(name, tmp_path)
    assert "\n" not in str(caught.value)


def test_packages_that_only_a_metric_needs_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    for name, key in (("cb", "hypothesis"), ("cola", "sentence")):
        write(tmp_path, f"{name}.validation.jsonl", [{key: "A cat meows.", "premise": "Cats.", "label": 1}] * 2)
        with pytest.raises(ConfigError, match=f"{name} needs the Python package sklearn, which is not installed"):
            loaded(name, tmp_path)


def test_metrics_that_cannot_be_fetched_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    write(tmp_path, "polemo2_in.test.jsonl", [{"sentence": "Tak.", "target": "__label__meta_amb"}] * 2)
    write(tmp_path, "wmt-ro-en-t5-prompt.validation.jsonl", [{"translation": {"en": "a", "ro": "b"}}] * 2)
    for name, metric in (("polemo2_in", "accuracy"), ("wmt-ro-en-t5-prompt", "wer")):
        with pytest.raises(ConfigError, match=rf"{name} needs the metric .*{metric}, which .* could not fetch"):
            loaded(name, tmp_path)


def test_the_hub_out_of_reach_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    for name in ("sciq", "gpqa_main_zeroshot"):
        task = find_task(name)
        assert isinstance(task, PublishedTask)
        with pytest.raises(ConfigError, match=rf"{name} needs something from the Hugging Face hub .* HF_TOKEN"):
            load_task(task, None)


def test_examples_that_are_missing_are_named(folder: Path, tmp_path: Path) -> None:
    write(tmp_path, "gsm8k.test.jsonl", gsm8k(0, 2))
    write(
        tmp_path, "winogrande.validation.jsonl", [{"sentence": "_ sat.", "option1": "A", "option2": "B", "answer": "1"}]
    )
    with pytest.raises(DataError, match=r"gsm8k takes its 5 examples from its train split; add gsm8k.train.jsonl"):
        loaded("gsm8k", tmp_path)
    with pytest.raises(DataError, match=r"winogrande takes its 2 examples from its train split"):
        loaded("winogrande", tmp_path, 2)
    with pytest.raises(DataError, match=r"gsm8k.train.jsonl: 6 rows, but 7 are needed"):
        loaded("gsm8k", folder, 7)
    with pytest.raises(DataError, match=r"add gsm8k.test.jsonl.*; its 5 examples are read from gsm8k.train.jsonl"):
        loaded("gsm8k", tmp_path / "..")
    assert loaded("gsm8k", tmp_path, 0)["tasks"]["gsm8k"].get_config("num_fewshot") == 0


def test_rows_that_do_not_fit_are_named(tmp_path: Path, texts: TextModel) -> None:
    rows = sciq(4)
    write(tmp_path, "sciq.test.jsonl", [{**row, "support": None} if n == 3 else row for n, row in enumerate(rows)])
    with pytest.raises(DataError, match=r"task sciq: lm-eval cannot score its rows \(UndefinedError"):
        scores_of("sciq", tmp_path, texts)
    write(tmp_path, "sciq.test.jsonl", [{key: row[key] for key in row if key != "support"} for row in rows])
    with pytest.raises(ConfigError, match=r"sciq cannot be loaded from .*; its rows must have the keys"):
        loaded("sciq", tmp_path)
    write(tmp_path, "sciq.test.jsonl", [*rows, {"question": "?"}])
    with pytest.raises(DataError, match=r"sciq.test.jsonl, line 5: no 'support'; task sciq needs question, support"):
        loaded("sciq", tmp_path)
    write(tmp_path, "sciq.test.jsonl", [*rows, {**rows[0], "support": 3}])
    with pytest.raises(DataError, match=r"sciq.test.jsonl: a key has values of different types"):
        loaded("sciq", tmp_path)


def test_every_name_of_lm_eval_is_accepted() -> None:
    manager: Any = TaskManager()
    names = set(manager.all_tasks)
    assert len(names) > 10_000
    assert {"mmlu", "mmlu_stem_tasks", "sciq"} <= names <= harness_names()
    with pytest.raises(ConfigError, match="unknown task 'sciqq'; did you mean 'sciq'"):
        find_task("sciqq")


@pytest.mark.release
def test_an_interrupt_ends_scoring_with_one_line(trained: RunResult, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run_dir, run)
    arguments = ["--run", str(run), "--tasks", "wikitext", "--local-data", str(tmp_path)]
    write(tmp_path, "wikitext.test.jsonl", wikitext(5) * 400)
    code = f"from src.cli import run_verb; from src import evaluate; run_verb(lambda: evaluate.main({arguments!r}))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    seen = ""
    while "wikitext (batches)" not in seen and (character := process.stderr.read(1)):
        seen += character
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130, seen + rest
    assert "Traceback" not in rest
    assert rest.rstrip().endswith("interrupted")
