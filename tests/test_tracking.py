"""Weights & Biases without an account, read back from disk."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from src.config import WandbConfig
from src.run_directory import RunDirectory
from src.tracking import wandb_mode
from src.train import resumed_config, train
from tests.conftest import small_config


def test_auto_is_online_with_a_key_and_offline_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode(WandbConfig()) == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password " + "0" * 40 + "\n")
    assert wandb_mode(WandbConfig()) == "online"
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert wandb_mode(WandbConfig()) == "online"
    assert wandb_mode(WandbConfig(mode="disabled")) == "disabled"


def test_an_offline_run_holds_config_and_metrics(
    tmp_path: Path, small_overrides: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("SECRET_OF_THE_USER", "do-not-record-me")
    config = small_config(
        small_overrides, tmp_path, "trainer.precision=32-true", "trainer.max_steps=12", "wandb.mode=offline"
    )
    run = train(config).run_dir
    (record,) = run.glob("wandb/offline-run-*")
    wandb = Path(sys.executable).parent / "wandb"
    shown = subprocess.run([wandb, "leet", "inspect", "--json", record], capture_output=True, text=True, check=True)
    for name in ("train/loss", "train/router/entropy", "train/tokens_per_second", "final/difference", "lut/bytes"):
        assert json.dumps(name)[1:-1] in shown.stdout, name
    assert "expert_intermediate_size" in shown.stdout
    raw = b"".join(path.read_bytes() for path in record.rglob("*") if path.is_file())
    assert b"do-not-record-me" not in raw


def test_a_resumed_run_is_the_same_run_at_wandb(tmp_path: Path, small_overrides: Sequence[str]) -> None:
    results = ("lut.at_fit_end=false", "evaluation.at_fit_end=false", "trainer.precision=32-true")
    config = small_config(small_overrides, tmp_path, *results, "trainer.max_steps=4", "wandb.mode=offline")
    run = RunDirectory(train(config).run_dir)
    train(resumed_config(run, None, ["trainer.max_steps=8"]), run)
    records = [path.name for path in run.path.glob("wandb/offline-run-*")]
    identity = json.loads(run.report_path.read_text())["wandb_id"]
    assert len(records) == 2
    assert {name.rpartition("-")[2] for name in records} == {identity}
