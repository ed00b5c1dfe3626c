"""Evaluation and dashboard under a real Trainer: they change nothing, and any number of ranks scores alike."""

import csv
import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import matplotlib.image
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from callbacks import DashboardCallback, EvaluationCallback, RunCallback
from src.config import load_run_config
from src.data.windows import StepBatch
from src.errors import ConfigError, UserError
from src.evaluation.held_out import held_out_of_run
from src.evaluation.suite import prepare_suite
from src.model.router import Router, Routing, router_probs
from src.run_directory import RunDirectory
from src.train import RunResult, train
from src.training.lightning_module import LanguageModel
from tests.conftest import small_config
from tests.distributed.processes import run_ranks

QUICK = ("trainer.precision=32-true", "trainer.max_steps=6", "trainer.val_check_interval=2")


def logged(run: Path, name: str) -> list[str]:
    with (run / "metrics.csv").open(newline="") as handle:
        return [row[name] for row in csv.DictReader(handle) if row.get(name)]


def test_loss_curves_are_the_same_bits_with_and_without_it(tmp_path: Path, small_overrides: Sequence[str]) -> None:
    options = [*QUICK, "trainer.log_every_n_steps=1", "evaluation.task_limit=8", "lut.at_fit_end=false"]
    watched = train(small_config(small_overrides, tmp_path, *options, "evaluation.every_validations=1")).run_dir
    alone = ("evaluation.at_fit_end=false", "evaluation.dashboard=false")
    left_alone = train(small_config(small_overrides, tmp_path, *options, *alone)).run_dir
    assert len(logged(watched, "eval/next_passage/acc")) == 3
    assert len(logged(watched, "val/router/effective_experts")) == 3
    assert not (left_alone / "figures").exists()
    for name, count in (("train/loss", 6), ("train/gradient_norm", 6), ("val/loss", 3)):
        assert logged(watched, name) == logged(left_alone, name)
        assert len(logged(watched, name)) == count


def test_a_report_holds_both_forms_on_text_and_two_tasks(trained: RunResult) -> None:
    report = json.loads((trained.run_dir / "report.json").read_text())["evaluation"]
    rows = {(row["name"], row["metric"]): row for row in report["comparison"]}
    assert {"held_out", "next_passage", "repeated_word"} == {name for name, _ in rows}
    for row in rows.values():
        assert abs(row["difference"]) <= 1e-4
        assert row["stderr"] is not None
    for name in ("next_passage", "repeated_word"):
        row = rows[name, "acc"]
        assert row["changed_predictions"] == row["near_ties"]  # float32: the same answers up to near-ties
        assert report["training_form"]["tasks"][name]["acc"] == row["first"]
        assert report["lookup_form"]["tasks"][name]["acc"] == row["second"]
    assert report["training_form"]["tasks"]["next_passage"]["acc"] > 0.25 + 0.05


def test_pictures_lie_in_the_run_directory(trained: RunResult) -> None:
    names = {path.name for path in (trained.run_dir / "figures").iterdir()}
    assert names == {"router_probability.png", "router_entropy.png", "expert_tokens.png"}


def test_a_router_forced_to_one_expert_shows(
    tmp_path: Path, trained: RunResult, small_overrides: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def to_the_third(self: Router, hidden_states: torch.Tensor) -> Routing:
        bias = torch.tensor([0.0, 0, 12, 0])
        logits = torch.nn.functional.linear(hidden_states, self.weight) + bias
        return Routing(logits, router_probs(logits), None)

    monkeypatch.setattr(Router, "forward", to_the_third)
    options = [*QUICK, "trainer.max_steps=2", "evaluation.at_fit_end=false", "lut.at_fit_end=false"]
    collapsed = train(small_config(small_overrides, tmp_path, *options)).run_dir
    assert set(logged(trained.run_dir, "val/router/collapsed_layers")) == {"0.0"}
    assert min(map(float, logged(trained.run_dir, "val/router/effective_experts"))) > 2
    assert set(logged(collapsed, "val/router/collapsed_layers")) == {"2.0"}
    assert max(map(float, logged(collapsed, "val/router/effective_experts"))) < 1.05
    assert max(map(float, logged(collapsed, "val/router/entropy"))) < 0.05
    assert _brightness(collapsed) > 3 * _brightness(trained.run_dir)


def _brightness(run: Path) -> float:
    """Return how much of the heat map has the colour of a probability near 1; its colour bar always has some."""
    pixels = matplotlib.image.imread(run / "figures" / "router_probability.png")[..., :3]
    return float(((pixels[..., 0] > 0.9) & (pixels[..., 1] > 0.8) & (pixels[..., 2] < 0.3)).mean())


def test_a_mistake_in_tasks_ends_before_a_run_begins(tmp_path: Path, small_overrides: Sequence[str]) -> None:
    with pytest.raises(ConfigError, match="did you mean 'next_passage'"):
        small_config(small_overrides, tmp_path, *QUICK, "evaluation.tasks=[next_pasage]")
    missing = ("evaluation.tasks=[piqa]", f"evaluation.local_data={tmp_path}/nowhere")
    with pytest.raises(UserError, match=r"no such folder of evaluation data|evaluation.tasks: piqa needs lm-eval"):
        train(small_config(small_overrides, tmp_path, *QUICK, *missing))
    assert not (tmp_path / "quickstart").exists()


class _Idle(LanguageModel):
    """Holds trained weights and trains no further."""

    def training_step(self, batch: StepBatch | torch.Tensor, batch_idx: int) -> Any:
        return None


@pytest.mark.slow
def test_two_ranks_score_as_one(tmp_path: Path, trained: RunResult) -> None:
    reports: list[dict[str, Any]] = []
    for devices in (1, 2):
        run = RunDirectory(tmp_path / str(devices))
        shutil.copytree(trained.run_dir, run.path)
        (run.path / "report.json").unlink()
        shutil.rmtree(run.path / "figures")
        config = load_run_config(run)
        module = _Idle(config.model, config.objective, config.optimizer, torch.ones(512, dtype=torch.int64))
        module.model.load_state_dict({**load_file(run.backbone_path), **load_file(run.experts_path)})
        text, _ = held_out_of_run(run, config.data)
        suite = prepare_suite(text, config.evaluation)
        callbacks: list[lightning.Callback] = [
            shared := RunCallback(run),
            DashboardCallback(shared, config.evaluation, text),
            EvaluationCallback(
                shared, config.evaluation, suite=suite, tokens_per_step=1, console=Console(quiet=True), is_written=True
            ),
        ]
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=devices,
            strategy="ddp_fork" if devices > 1 else "auto",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            max_epochs=1,
            callbacks=callbacks,
        )
        trainer.fit(module, torch.utils.data.DataLoader(_Nothing(), batch_size=None))
        assert len(list((run.path / "figures").iterdir())) == 3
        reports.append(json.loads(run.report_path.read_text()))
    assert reports[0]["evaluation"] == reports[1]["evaluation"]
    assert reports[0]["initial"] == reports[1]["initial"]


class _Nothing(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.zeros(1, 1, 2, dtype=torch.int64)


@pytest.mark.slow
def test_a_run_with_two_ranks_evaluates_on_schedule(tmp_path: Path, small_overrides: Sequence[str]) -> None:
    options = (*QUICK, "evaluation.every_validations=1", "evaluation.task_limit=8")
    runs = [tmp_path / name for name in ("one", "two")]
    train(small_config(small_overrides, tmp_path, *options, "name=one"))
    two = small_config(small_overrides, tmp_path, *options, "trainer.strategy=ddp", "trainer.devices=2", "name=two")
    run_ranks(partial(train, two), tmp_path / "logs")
    for name in ("eval/next_passage/log_likelihood", "eval/repeated_word/log_likelihood", "eval/held_out/loss"):
        one, two = ([float(value) for value in logged(run, name)] for run in runs)
        assert len(one) == 3
        assert one == pytest.approx(two, abs=2e-3)  # gradients of two ranks are summed in another order
