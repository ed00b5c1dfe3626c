"""Weights & Biases without an account, read back from disk."""

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from src.config import load_config
from src.errors import ConfigError
from src.fit import software_versions
from src.run_directory import RunDirectory
from src.train import resumed_config, train
from src.training.config import WandbConfig
from src.training.tracking import (
    NOT_LOGGED,
    MetricsFile,
    artifact_name,
    build_loggers,
    code_version,
    wandb_mode,
    without_paths,
)
from tests.conftest import CONFIGS, STDLIB, small_config


def test_auto_is_online_with_a_key_and_offline_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode(WandbConfig()) == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password " + "0" * 40 + "\n")
    assert wandb_mode(WandbConfig()) == "online"
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert wandb_mode(WandbConfig()) == "online"
    assert wandb_mode(WandbConfig(mode="disabled")) == "disabled"


def test_auto_is_what_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_overrides: Sequence[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    for value, mode in (("offline", "offline"), ("dryrun", "offline"), ("disabled", "disabled"), ("online", "online")):
        monkeypatch.setenv("WANDB_MODE", value)
        assert wandb_mode(WandbConfig()) == mode
        assert wandb_mode(WandbConfig(mode="online")) == "online"  # a key that is set wins
    monkeypatch.setenv("WANDB_DISABLED", "true")
    assert wandb_mode(WandbConfig()) == "disabled"
    monkeypatch.delenv("WANDB_DISABLED")
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(ConfigError, match=r"WANDB_MODE: 'sometimes', but it must be one of online, offline, disabled"):
        train(small_config(small_overrides, tmp_path, "wandb.mode=auto"))
    assert not any(tmp_path.iterdir())
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    for project, expected in ((None, "theirs"), ("ours", "ours")):
        loggers = build_loggers(WandbConfig(mode="offline", project=project), {}, RunDirectory(tmp_path))
        assert [logger.name for logger in loggers] == [None, expected]


def records(run: Path) -> list[dict[str, Any]]:
    """Read the only W&B record of a run as W&B itself does."""
    (record,) = run.glob("wandb/offline-run-*")
    wandb = Path(sys.executable).parent / "wandb"
    shown = subprocess.run([wandb, "leet", "inspect", "--json", record], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in shown.stdout.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory: pytest.TempPathFactory, small_overrides: Sequence[str]) -> Path:
    """A run of a few steps with two validations, recorded offline."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_API_KEY", raising=False)
        patch.setenv("SECRET_OF_THE_USER", "do-not-record-me")
        options = ["trainer.precision=32-true", "trainer.max_steps=12", "trainer.val_check_interval=6"]
        tracking = ["wandb.mode=offline", "wandb.log_table=true", "name=seed=1 grün"]
        return train(small_config(small_overrides, tmp_path_factory.mktemp("runs"), *options, *tracking)).run_dir


def test_an_offline_run_holds_config_versions_and_metrics(offline_run: Path) -> None:
    found = records(offline_run)
    names = {name for record in found if record["type"] == "history" for name in record["history"]["item"]}
    assert names >= {
        "train/loss",
        "train/router/entropy",
        "train/tokens_per_second",
        "val/loss",
        "val/router/effective_experts",
        "final/difference",
        "final/lookup_form/next_passage/acc",
        "lut/bytes",
    }
    (config,) = (record["run"]["config"]["update"] for record in found if record["type"] == "run")
    assert config["model"]["expert_intermediate_size"] == 128
    assert config["code"]["version"]
    report = json.loads((offline_run / "report.json").read_text())
    assert config["fingerprints"]["dataset"] == report["corpus"]["fingerprint"]
    assert config["fingerprints"]["tokenizer"] == report["corpus"]["tokenizer"]


def test_an_offline_run_holds_pictures_and_tables_of_each_validation(offline_run: Path) -> None:
    (media,) = offline_run.glob("wandb/offline-run-*/files/media")
    items = [record["history"]["item"] for record in records(offline_run) if record["type"] == "history"]
    for name in ("router_probability", "router_entropy", "expert_tokens"):
        shown = [item for item in items if f"figures/{name}._type" in item]
        assert [item["trainer/global_step"] for item in shown] == [5, 11]  # as Lightning's own val/loss
        last = media.parent / shown[-1][f"figures/{name}.filenames"][0]
        assert last.read_bytes() == (offline_run / "figures" / f"{name}.png").read_bytes()
    tables = sorted((media / "table" / "tables").glob("samples*.json"), key=lambda path: path.stat().st_size)
    samples = json.loads(tables[-1].read_text())
    assert samples["columns"] == ["step", "prompt", "text"]
    assert [row[0] for row in samples["data"]] == [6, 12]
    assert all(row[2].startswith("def ") for row in samples["data"])
    tokens = json.loads(next((media / "table" / "tables").glob("expert_tokens*.json")).read_text())
    assert {(row[0], row[1]) for row in tokens["data"]} == {(layer, expert) for layer in (0, 1) for expert in range(4)}


def test_report_and_table_are_artifacts(offline_run: Path) -> None:
    artifacts = {
        record["artifact"]["name"]: {entry["path"] for entry in record["artifact"]["manifest"]["contents"]}
        for record in records(offline_run)
        if record["type"] == "artifact"
    }
    assert artifacts["report-seed-1-gr-n"] == {"report.json"}
    assert artifacts["lut-seed-1-gr-n"] >= {"manifest.json", "rows-00000.safetensors", "token_counts.safetensors"}


@pytest.mark.parametrize("name", ["a=b", "a b", "grün", "名前", "x" * 200, "#1 (new)"])
def test_every_run_name_gives_an_artifact_name(name: str) -> None:
    import wandb

    for kind in ("report", "lut"):
        assert wandb.Artifact(artifact_name(kind, name), type=kind).name.startswith(f"{kind}-")


@pytest.mark.parametrize("override", ["wandb.project=a/b", "wandb.project=50%", f"wandb.tags={'x' * 65}"])
def test_names_that_wandb_refuses_are_mistakes_of_the_config(override: str) -> None:
    with pytest.raises(ConfigError, match=rf"{override.partition('=')[0]}: .*, but W&B takes"):
        load_config(CONFIGS / "quickstart.yaml", [override])


def test_nothing_outside_the_run_is_recorded(offline_run: Path, cache_dir: Path) -> None:
    (record,) = offline_run.glob("wandb/offline-run-*")
    recorded = [*record.glob("*.wandb"), *(path for path in (record / "files").rglob("*") if path.is_file())]
    recorded.append(offline_run / "report.json")  # sent as an artifact
    raw = b"".join(path.read_bytes() for path in recorded).replace(str(offline_run).encode(), b"RUN")
    outside = (offline_run.parent, cache_dir, STDLIB, Path.home(), Path(sys.executable).parent, CONFIGS.parent)
    for secret in ("do-not-record-me", *map(str, outside)):
        assert secret.encode() not in raw, secret
    (run,) = (record["run"] for record in records(offline_run) if record["type"] == "run")
    assert run["host"] == "not recorded"
    assert run["config"]["update"]["output_dir"] == "(a path: not logged)"


def test_a_resumed_run_is_the_same_run_at_wandb(tmp_path: Path, small_overrides: Sequence[str]) -> None:
    results = ("lut.at_fit_end=false", "evaluation.at_fit_end=false", "trainer.precision=32-true")
    config = small_config(small_overrides, tmp_path, *results, "trainer.max_steps=4", "wandb.mode=offline")
    run = RunDirectory(train(config).run_dir)
    train(resumed_config(run, None, ["trainer.max_steps=8"]), run)
    records = [path.name for path in run.path.glob("wandb/offline-run-*")]
    identity = json.loads(run.report_path.read_text())["wandb_id"]
    assert len(records) == 2
    assert {name.rpartition("-")[2] for name in records} == {identity}


def test_the_code_of_a_checkout_is_its_commit() -> None:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=CONFIGS.parent, capture_output=True, text=True, check=False)
    found = code_version()
    assert found["commit"] == (done.stdout.strip() or None)
    assert (found["modified"] is None) == (found["commit"] is None)


def test_code_that_was_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = importlib.metadata.version

    def without_mole_and_tokenizers(name: str) -> str:
        if name in ("mole", "tokenizers"):
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "version", without_mole_and_tokenizers)
    assert code_version()["version"] is None
    versions = software_versions()
    assert (versions["mole"], versions["tokenizers"]) == (None, None)
    assert versions["torch"] == installed("torch")


def test_metrics_continue_in_a_file_with_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,train/loss,train/router/share/layer_0\r\n0,5.5,0.25\r\n1,5.0,0.5\r\n2,4.5,0.25\r\n3,4")
    metrics = MetricsFile(tmp_path, first_step=2)
    metrics.log_metrics({"train/loss": 4.75}, step=2)
    metrics.save()
    metrics.log_metrics({"train/loss": 4.25}, step=3)
    metrics.log_metrics({"val/loss": 6.0}, step=3)
    metrics.finalize("success")
    assert path.read_text().split() == [
        "step,train/loss,train/router/share/layer_0,val/loss",
        "0,5.5,0.25,",
        "1,5.0,0.5,",
        "2,4.75,,",
        "3,4.25,,",
        "3,,,6.0",
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.csv"]


def test_paths_of_a_config_are_left_out_and_names_stay() -> None:
    config = {
        "name": "try",
        "init_from": None,
        "data": {"files": ["/a/b", "c"], "sources": [{"hub": "org/set", "files": []}, {"hub": "/disk/set"}]},
    }
    assert without_paths(config) == {
        "name": "try",
        "init_from": None,
        "data": {"files": [NOT_LOGGED] * 2, "sources": [{"hub": "org/set", "files": []}, {"hub": NOT_LOGGED}]},
    }
