"""The whole quick start, its training cut to 60 steps: what the project promises on a small machine."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from src.config import load_run_config
from src.evaluation.held_out import held_out_of_run
from src.inference import load_model
from src.run_directory import RunDirectory
from tests.conftest import CONFIGS

pytestmark = [pytest.mark.slow, pytest.mark.alone]
ROOT = CONFIGS.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs")
    done = run(
        "src.train", f"output_dir={output}", "wandb.mode=offline", "trainer.max_steps=60", "optimizer.warmup_steps=20"
    )
    assert done.returncode == 0, done.stderr
    return output / "quickstart"


def test_it_learns_and_beats_zlib(quickstart: Path) -> None:
    report = json.loads((quickstart / "report.json").read_text())
    assert abs(report["initial"]["loss"] - math.log(4096)) < 0.1
    assert report["training_form"]["bits_per_byte"] < report["zlib_bits_per_byte"]
    assert abs(report["difference"]) < 1e-5
    assert report["table"]["precision"] == "float32"


def test_its_sample_looks_like_python(quickstart: Path) -> None:
    sample = json.loads((quickstart / "report.json").read_text())["sample"]
    assert re.search(r"\n +(self|return|if|for|def|raise|#|\"\"\"|\w+ = )", sample), sample


def test_its_table_matters_and_every_form_agrees(quickstart: Path, tmp_path: Path) -> None:
    done = run("src.verify", "--run", str(quickstart), "--json", str(tmp_path / "proof.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    checks = {check["name"]: check for check in json.loads((tmp_path / "proof.json").read_text())}
    assert checks["control: rows replaced by zeros"]["values"]["rise"] >= 0.5
    assert checks["control: rows permuted over ids"]["values"]["rise"] >= 0.5
    assert checks["logits through memmap"]["values"]["max_abs"] <= 5e-5
    assert checks["logits through memmap"]["values"]["tokens"] >= 4096
    assert checks["greedy text, 32 prompts x 64 tokens"]["holds"]


def test_a_bfloat16_table_costs_next_to_nothing(quickstart: Path) -> None:
    built = run("src.reparameterize", "--run", str(quickstart), "--dtype", "bfloat16", "--lut", "lut-bf16")
    assert built.returncode == 0, built.stderr
    directory = RunDirectory(quickstart)
    text, note = held_out_of_run(directory, load_run_config(directory).data)
    assert note is None
    with load_model(quickstart, experts="lut", lut="lut-bf16", dtype=torch.float32) as model:
        loss = text.score(model).loss
    report = json.loads(directory.report_path.read_text())
    assert abs(loss - report["training_form"]["loss"]) <= 1e-4
