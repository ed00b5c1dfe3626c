"""Training under a real Trainer: accumulation, objective, what is logged, and ranks."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from src.config import RunConfig
from src.data.packed_corpus import prepare_corpus
from src.evaluation.held_out import held_out
from src.model import Transformer
from src.model.loss import next_token_loss
from src.model.router import load_balance_loss, z_loss
from src.run_directory import RunDirectory
from src.train import RunResult, resumed_config, train
from tests.conftest import small_config

ONLY_TRAIN = (
    "lut.at_fit_end=false",
    "evaluation.at_fit_end=false",
    "evaluation.dashboard=false",
    "trainer.precision=32-true",
    "trainer.log_every_n_steps=1",
    "trainer.val_check_interval=4",
)


def losses(config: RunConfig, column: str = "train/loss") -> list[float]:
    run = train(config).run_dir
    return [float(row[column]) for row in read_metrics(run) if row.get(column)]


def read_metrics(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as handle:
        return list(csv.DictReader(handle))


def test_accumulated_micro_batches_are_one_batch(tmp_path: Path, small_overrides: Sequence[str]) -> None:
    whole = small_config(small_overrides, tmp_path, *ONLY_TRAIN, "trainer.max_steps=6", "data.micro_batch_size=8")
    parts = small_config(small_overrides, tmp_path, *ONLY_TRAIN, "trainer.max_steps=6", "data.micro_batch_size=2")
    assert losses(whole) == pytest.approx(losses(parts), abs=2e-6)


def test_router_losses_enter_the_objective_with_their_weight(tmp_path: Path, small_overrides: Sequence[str]) -> None:
    weights = ("objective.load_balance_weight=0.5", "objective.z_loss_weight=0.25")
    plain = small_config(small_overrides, tmp_path, *ONLY_TRAIN, "trainer.max_steps=2", "optimizer.warmup_steps=0")
    weighted = small_config(
        small_overrides, tmp_path, *ONLY_TRAIN, "trainer.max_steps=2", "optimizer.warmup_steps=0", *weights
    )
    without, with_losses = losses(plain), losses(weighted)
    assert without[0] == with_losses[0]  # the logged loss is the language model's alone
    assert without[1] != with_losses[1]  # but the step was another


def test_every_named_metric_is_logged(trained: RunResult) -> None:
    seen = {name for row in read_metrics(trained.run_dir) for name, value in row.items() if value}
    scalars = {
        "loss",
        "perplexity",
        "gradient_norm",
        "tokens_per_second",
        "model_flops_utilization",
        "peak_memory_bytes",
    }
    routing = {f"router/{name}" for name in ("entropy", "load_balance_loss", "z_loss", "max_share")}
    per_layer = {f"{name}/layer_{layer}" for name in routing for layer in (0, 1)}
    for split, names in (
        ("train", scalars | routing | per_layer),
        ("val", {"loss", "perplexity", "bits_per_byte"} | routing | per_layer),
    ):
        assert {f"{split}/{name}" for name in names} <= seen
    assert any(name.startswith("train/learning_rate") for name in seen)


def test_logged_values_are_what_the_model_gives(tmp_path: Path, small_overrides: Sequence[str]) -> None:
    config = small_config(
        small_overrides, tmp_path, *ONLY_TRAIN, "trainer.max_steps=4", "optimizer.learning_rate=1e-12"
    )
    row = next(row for row in read_metrics(train(config).run_dir) if row.get("val/loss"))
    corpus = prepare_corpus(config.data)
    torch.manual_seed(config.seed)
    model = Transformer(config.model)  # a learning rate of 1e-12 leaves the initial weights
    windows = held_out(corpus, config.data, config.model.vocab_size).windows
    with torch.no_grad():
        trunk = model.trunk(windows[:, :-1])
        loss = float(next_token_loss(trunk.hidden_states, model.head, windows[:, 1:]))
        balance = sum(float(load_balance_loss(logits, None)) for logits in trunk.router_logits) / 2
        drift = sum(float(z_loss(logits)) for logits in trunk.router_logits) / 2
    assert float(row["val/loss"]) == pytest.approx(loss, abs=1e-5)
    assert float(row["val/perplexity"]) == pytest.approx(math.exp(loss), rel=1e-4)
    assert float(row["val/router/load_balance_loss"]) == pytest.approx(balance, abs=5e-2)  # mean of batches
    assert float(row["val/router/z_loss"]) == pytest.approx(drift, rel=1e-3)
    shares = [float(row[f"val/router/max_share/layer_{layer}"]) for layer in (0, 1)]
    assert 1 / 4 <= min(shares) <= max(shares) == float(row["val/router/max_share"]) < 1


def test_max_time_ends_training_and_the_rest_still_runs(tmp_path: Path, small_overrides: Sequence[str]) -> None:
    config = small_config(
        small_overrides,
        tmp_path,
        "trainer.precision=32-true",
        "trainer.max_steps=100000",
        'trainer.max_time="00:00:00:02"',
    )
    result = train(config)
    assert result.report is not None
    assert 0 < result.report.steps < 100000
    assert (result.run_dir / "lut" / "manifest.json").is_file()
    best = (result.run_dir / "checkpoints" / "best.ckpt").resolve().name
    assert best == f"step-{result.report.steps:08d}.ckpt"  # validated when time was up, before it was written
    run = RunDirectory(result.run_dir)
    assert train(resumed_config(run, None, []), run).report is None  # nothing is left to do


@pytest.mark.parametrize("micro_batch_size", [2, 8])
def test_executions_train_alike(tmp_path: Path, small_overrides: Sequence[str], micro_batch_size: int) -> None:
    def run(execution: str) -> list[float]:
        more = (
            f"model.expert_execution={execution}",
            f"data.micro_batch_size={micro_batch_size}",
            "trainer.max_steps=6",
        )
        return losses(small_config(small_overrides, tmp_path, *ONLY_TRAIN, *more))

    per_token = run("per_token")
    assert run("unique") == pytest.approx(per_token, abs=2e-6)
    assert run("unique_per_step") == pytest.approx(per_token, abs=2e-6)


@pytest.mark.slow
def test_two_ranks_are_one_process_that_accumulates(tmp_path: Path, small_overrides: Sequence[str]) -> None:
    alone = small_config(small_overrides, tmp_path, *ONLY_TRAIN, "trainer.max_steps=10", "name=alone")
    two = small_config(
        small_overrides,
        tmp_path,
        *ONLY_TRAIN,
        "trainer.max_steps=10",
        "trainer.devices=2",
        "trainer.strategy=ddp_fork",
        "name=two",
    )
    assert losses(alone) == pytest.approx(losses(two), abs=1e-6)
