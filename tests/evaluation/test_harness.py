"""The adapter to lm-eval: eight tasks offline, scored as plain loops score them. Needs the extra `eval`."""

import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")


from src import evaluate
from src.config import load_run_config
from src.evaluation.config import EvaluationConfig
from src.evaluation.definitions import load_task
from src.evaluation.harness import HarnessModel, score_task
from src.evaluation.held_out import HeldOut, held_out_of_run
from src.evaluation.likelihood import TextModel
from src.evaluation.suite import evaluate_model, evaluating, prepare_suite
from src.evaluation.tasks import read_rows
from src.inference import InferenceModel, load_model
from src.run_directory import RunDirectory
from src.train import RunResult
from tests.evaluation.published_rows import PUBLISHED, write_rows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evals")
    write_rows(folder)
    return folder


@pytest.fixture(scope="module")
def text(trained: RunResult) -> HeldOut:
    run = RunDirectory(trained.run_dir)
    return held_out_of_run(run, load_run_config(run).data)[0]


@pytest.fixture(scope="module")
def model(trained: RunResult) -> InferenceModel:
    return load_model(trained.run_dir, experts="ffn")


def test_eight_tasks_run_offline(folder: Path, text: HeldOut, model: InferenceModel) -> None:
    config = EvaluationConfig(tasks=list(PUBLISHED), local_data=str(folder))
    with evaluating(model):
        scores = {score.task: score for score in evaluate_model(model, prepare_suite(text, config), batch_size=8).tasks}
    assert set(scores) == set(PUBLISHED)
    for name, score in scores.items():
        documents = 3 if name == "race" else 50
        assert len(score.predictions) == len(score.gaps) == documents
        assert all(len(values) == documents for values in score.values.values())
        assert all(gap >= 0 for gap in score.gaps)
        assert 0 <= score.mean("acc") <= 1


def test_answers_are_those_of_plain_loops(folder: Path, text: HeldOut, model: InferenceModel) -> None:
    tokenizer = text.tokenizer
    task = PUBLISHED["arc_easy"]
    (score,) = score_task(load_task(task, folder), TextModel(model, text.rule, max_length=128), limit=20)
    for number, row in enumerate(read_rows(folder, task, limit=20)):
        context = f"Question: {row['question']}\nAnswer:"
        values: list[float] = []
        for choice in row["choices"]["text"]:
            ids = tokenizer.encode(f"{context} {choice}").ids
            start = len(tokenizer.encode(context).ids)
            log_probs = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
            values.append(sum(float(log_probs[place - 1, ids[place]]) for place in range(start, len(ids))))
        assert score.predictions[number] == values.index(max(values))
        assert score.values["acc"][number] == (score.predictions[number] == 0)
        best = sorted(values)[-2:]
        assert score.gaps[number] == pytest.approx(best[1] - best[0], abs=1e-4)


def test_a_long_text_is_scored_whole(text: HeldOut, model: InferenceModel) -> None:
    texts = TextModel(model, text.rule, max_length=24)

    class _Asked:
        args = (text.tokenizer.decode(text.windows[0].tolist()),)

    (found,) = HarnessModel(texts).loglikelihood_rolling([_Asked()])
    ids = [texts.start_of_text, *texts.encode(_Asked.args[0])]
    expected = 0.0
    for first in range(1, len(ids), 24):  # windows of at most 24 predicted ids; the last one is filled up with context
        last = min(first + 24, len(ids))
        log_probs = model(torch.tensor([ids[last - 25 : last - 1] if last > 24 else ids[: last - 1]]))[0].log_softmax(
            -1
        )
        expected += sum(float(log_probs[place - last, ids[place]]) for place in range(first, last))
    assert found == pytest.approx(expected, rel=1e-4)


def test_forms_are_compared_on_published_tasks(
    trained: RunResult, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run_dir, run)
    arguments = ["--run", str(run), "--compare", "ffn", "--tasks", "piqa,lambada_openai", "--local-data", str(folder)]
    evaluate.main([*arguments, "--limit", "10"])
    printed = capsys.readouterr().out
    assert "piqa acc_norm" in printed
    assert "lambada_openai" in printed
    assert "0/10" in printed
