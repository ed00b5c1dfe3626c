"""A resumed run: the same numbers from its checkpoint on, or a refusal that says why."""

import csv
import random
import re
import shutil
import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from src.config import RunConfig, load_run_config
from src.errors import ConfigError, RunError, UserError
from src.run_directory import RunDirectory
from src.train import RunResult, main, resumed_config, train
from src.training.checkpoints import CheckpointFiles
from src.training.resume import compare_configs
from tests.conftest import small_config
from tests.distributed.processes import start
from tests.training.test_lightning_module import ONLY_TRAIN, read_metrics

METRICS = ("train/loss", "train/gradient_norm", "val/loss", "train/learning_rate/backbone")
SMALLER = ("model.num_layers=1", "model.num_experts=2", "data.sequence_length=16", "data.validation_windows=8")
ACCUMULATING = (*ONLY_TRAIN, *SMALLER, "data.micro_batch_size=2")


def logged(run: Path) -> dict[str, dict[int, float]]:
    rows = read_metrics(run)
    return {name: {int(row["step"]): float(row[name]) for row in rows if row.get(name)} for name in METRICS}


def resume(run: Path, *overrides: str) -> RunResult:
    directory = RunDirectory(run)
    return train(resumed_config(directory, None, overrides), directory)


def test_a_resumed_run_keeps_what_validations_measured_and_counts_on(
    tmp_path: Path, small_overrides: Sequence[str]
) -> None:
    results = ("lut.at_fit_end=false", "evaluation.at_fit_end=false", "evaluation.every_validations=1")
    common = (*ACCUMULATING, *results, "evaluation.tasks=[next_passage]", "trainer.log_every_n_steps=3")
    common = (*common, "trainer.max_steps=12", "trainer.val_check_interval=4", "checkpoint.keep_last=2")
    whole = train(small_config(small_overrides, tmp_path, *common, "name=whole")).run_dir
    part = train(small_config(small_overrides, tmp_path, *common, "name=part")).run_dir
    (part / "checkpoints" / "step-00000012.ckpt").unlink()
    resume(part, "trainer.val_check_interval=6")

    def steps(run: Path, column: str) -> list[int]:
        return [int(row["step"]) for row in read_metrics(run) if row.get(column)]

    scores = next(name for name in read_metrics(whole)[0] if name.startswith("eval/"))
    assert steps(whole, scores) == steps(whole, "val/loss") == [3, 7, 11]
    assert steps(part, scores) == steps(part, "val/loss") == [3, 7, 11]
    assert logged(part)["train/loss"] == logged(whole)["train/loss"]
    assert steps(part, "train/gradient_norm") == [2, 5, 8, 11]


@pytest.mark.release
@pytest.mark.slow
def test_killed_at_any_moment_a_run_repeats_what_it_lost(
    tmp_path: Path, small_overrides: Sequence[str], attacks: int
) -> None:
    common = (*ACCUMULATING, "trainer.max_steps=300", "checkpoint.every_steps=50", "trainer.val_check_interval=120")
    common = (*common, "data.global_batch_size=4")
    whole = train(small_config(small_overrides, tmp_path, *common, "name=whole")).run_dir
    part = RunDirectory(tmp_path / "part")
    moments, files = random.Random(0), CheckpointFiles(part.checkpoints_path)
    go_on = partial(train, small_config(small_overrides, tmp_path, *common, "name=part"))
    for kill in range(attacks):
        known = files.steps()[-1:]
        process = start(go_on, tmp_path / "log")
        until = time.monotonic() + 90
        while files.steps()[-1:] == known:
            assert process.is_alive() and time.monotonic() < until, (tmp_path / "log").read_text()
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.4))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        workers = f"data.num_workers={2 * (kill % 2)}"
        go_on = partial(resume, part.path, workers)
    go_on()
    found, expected = logged(part.path), logged(whole)
    for name in METRICS:
        assert found[name].items() <= expected[name].items(), name
        assert max(found[name]) == max(expected[name])
    assert len(found["train/loss"]) >= 300 - attacks  # a step that was killed between its checkpoint and its log entry


def begun_config(small_overrides: Sequence[str], directory: Path) -> RunConfig:
    return small_config(small_overrides, directory, *ONLY_TRAIN, "trainer.max_steps=4")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, small_overrides: Sequence[str]) -> Path:
    """A run of 4 steps; treat its directory as read-only."""
    return train(begun_config(small_overrides, tmp_path_factory.mktemp("begun"))).run_dir


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("model.hidden_size=32", "model.hidden_size: 64 -> 32 (model shapes the weights)"),
        ("data.seed=1", "data.seed: 0 -> 1 (data decides which windows each step reads)"),
        ("data.global_batch_size=16", "data.global_batch_size: 8 -> 16 (data decides which windows"),
        ("optimizer.beta1=0.8", "optimizer.beta1: 0.9 -> 0.8 (optimizer is part of the optimizer's state)"),
        ("seed=3", "seed: 0 -> 3 (seed decided the weights that training began with)"),
    ],
)
def test_what_cannot_change_is_refused_by_name(override: str, reason: str, begun: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(reason)):
        resumed_config(RunDirectory(begun), None, [override, "trainer.max_steps=8"])


def test_what_changes_is_said(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory(begun)
    overrides = ["trainer.max_steps=8", "data.num_workers=2", "optimizer.gradient_clip_norm=2"]
    now = resumed_config(run, None, overrides)
    assert (now.trainer.max_steps, now.data.num_workers, now.optimizer.gradient_clip_norm) == (8, 2, 2)
    told = capsys.readouterr().err
    for change in ("trainer.max_steps: 4 -> 8", "data.num_workers: 0 -> 2", "optimizer.gradient_clip_norm: 1.0 -> 2.0"):
        assert change in told
    before = load_run_config(run).to_dict()
    assert compare_configs(run, before, before) == []
    averaged = {**before, "checkpoint": {**before["checkpoint"], "ema_decay": 0.9}}
    with pytest.raises(ConfigError, match=r"ema_decay: 0.9 -> None .* hold averaged weights"):
        compare_configs(run, averaged, before)


def test_a_run_that_cannot_be_resumed_says_why_before_it_prepares_the_corpus(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(run: Path, *overrides: str) -> str:
        with pytest.raises(UserError) as refused:
            resume(run, *overrides)
        return str(refused.value)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the corpus is prepared")

    copy = tmp_path / "copy"
    shutil.copytree(begun, copy)
    report = copy / "report.json"
    recorded = report.read_text()
    report.write_text(recorded.replace('"fingerprint": "', '"fingerprint": "0'))
    assert "was trained on corpus 0" in refusal(copy, "trainer.max_steps=8")
    report.write_text(recorded)
    monkeypatch.setattr("src.fit.prepare_corpus", never)
    parts = copy / "checkpoints" / "step-00000005.ckpt"  # as fsdp2 writes them with checkpoint.sharded
    parts.mkdir()
    assert "one part per device, which trainer.strategy auto cannot load" in refusal(copy, "trainer.max_steps=8")
    parts.rmdir()
    assert resume(copy).report is None
    report.write_text('{"corpus": ')
    assert "report.json: not readable JSON" in refusal(copy, "trainer.max_steps=8")
    report.write_text("[]")
    assert "report.json: holds a JSON list, expected an object" in refusal(copy, "trainer.max_steps=8")
    report.unlink()
    assert "records no corpus, so what the run was trained on is unknown" in refusal(copy, "trainer.max_steps=8")
    shutil.rmtree(copy / "checkpoints")
    assert "holds no checkpoint" in refusal(copy, "trainer.max_steps=8")
    with pytest.raises(RunError, match="no such run directory"):
        main(["--resume", str(tmp_path / "none")])


def test_metrics_after_the_checkpoint_are_replaced_and_the_rest_kept(begun: Path, tmp_path: Path) -> None:
    run = tmp_path / "copy"
    shutil.copytree(begun, run)
    with (run / "metrics.csv").open(newline="") as handle:
        header = next(csv.reader(handle))
    with (run / "metrics.csv").open("a", newline="") as handle:  # logged after the checkpoint, before a kill
        csv.DictWriter(handle, header).writerow({"step": "5", "train/loss": "99"})
    resume(run, "trainer.max_steps=8", "trainer.log_every_n_steps=1")
    losses = logged(run)["train/loss"]
    assert list(losses) == list(range(8))
    assert losses[5] != 99
    assert {step: losses[step] for step in range(4)} == logged(begun)["train/loss"]
