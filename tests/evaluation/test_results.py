"""Scores that a run keeps, document by document, and reports of models that have diverged."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from src.config import load_run_config
from src.evaluation.comparison import compare
from src.evaluation.held_out import held_out_of_run
from src.evaluation.perplexity import Score
from src.evaluation.report import Report, print_report
from src.evaluation.results import read_scores, write_scores
from src.evaluation.suite import evaluate_model, prepare_suite
from src.inference import load_model
from src.run_directory import RunDirectory
from src.train import RunResult


def test_a_run_keeps_the_scores_of_each_document(trained: RunResult) -> None:
    run = RunDirectory(trained.run_dir)
    scores, report = read_scores(run.scores_path), run.record()["evaluation"]
    assert set(scores) == {"training_form", "lookup_form"}
    for form, evaluation in scores.items():
        assert evaluation.to_dict() == report[form]
        assert [len(text.window_losses) for text in evaluation.texts] == [64]
        for task in evaluation.tasks:
            assert len(task.gaps) == report[form]["tasks"][task.task]["documents"] > 20
    rows = compare(scores["training_form"], scores["lookup_form"])
    assert [row.to_dict() for row in rows] == report["comparison"]


@pytest.mark.parametrize(("scale", "loss"), [(1e5, "finite"), (math.nan, "none")])
def test_a_diverged_model_still_gets_a_report(scale: float, loss: str, trained: RunResult, tmp_path: Path) -> None:
    config = load_run_config(RunDirectory(trained.run_dir))
    text, _ = held_out_of_run(RunDirectory(trained.run_dir), config.data)
    suite, evaluations = prepare_suite(text, config.evaluation), []
    for factor in (1.0, scale):
        with load_model(trained.run_dir, experts="ffn") as model:
            model.head.weight.mul_(factor)
            evaluations.append(evaluate_model(model, suite, batch_size=16))
    report = Report(
        steps=1,
        trained_tokens=1,
        initial=Score(loss=evaluations[1].texts[0].score.loss, tokens=1, bytes=1),
        training_evaluation=evaluations[0],
        lookup_evaluation=evaluations[1],
        zlib_bits_per_byte=2.0,
        table=None,
        training_form_bytes=1,
        lookup_form_bytes=None,
        sample=None,
    )
    run = RunDirectory(tmp_path)
    run.update_record(report.to_dict())
    write_scores(run.scores_path, {"lookup_form": evaluations[1]})
    found = json.loads(run.report_path.read_text(), parse_constant=_refuse)
    json.loads(run.scores_path.read_text(), parse_constant=_refuse)
    assert found["lookup_form"]["perplexity"] is None
    assert (found["lookup_form"]["loss"] is None) == (loss == "none")
    assert found["evaluation"]["training_form"]["diverged"] == []
    assert found["evaluation"]["lookup_form"]["diverged"] == ["held_out"]
    kept = read_scores(run.scores_path)["lookup_form"].texts[0]
    assert torch.equal(
        torch.tensor(kept.window_losses).isnan(), torch.tensor(evaluations[1].texts[0].window_losses).isnan()
    )
    printed = io.StringIO()
    print_report(report, Console(file=printed, width=120), tmp_path)
    assert "lookup form diverged: its loss on held_out is too large" in printed.getvalue()
    assert "training form diverged" not in printed.getvalue()


def _refuse(constant: str) -> Any:
    raise AssertionError(f"{constant} is not JSON")
