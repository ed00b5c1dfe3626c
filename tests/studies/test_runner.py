"""Studies that really run: rows say what runs measured, finished cells stay, and whatever ends a study can go on."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import Popen

import pytest

from src.config import load_config, load_run_config
from src.data.packed_corpus import prepare_corpus
from src.run_directory import RunDirectory
from src.studies.cells import Cell, Choice, config_digest, reported_cells
from src.studies.definition import Study
from src.studies.measure import measure
from src.studies.plan import Cost, cost_of
from src.studies.rows import Row, read_rows
from src.system.locks import open_locked
from src.train import RunResult
from tests.conftest import CONFIGS, SMALL, STDLIB
from tests.studies.made_up import write_study

ROOT = CONFIGS.parent
DEFINITION = f"""
question: Does it run?
config: {CONFIGS}/quickstart.yaml
overrides:
  trainer: {{max_steps: 24, max_time: null, precision: 32-true}}
  checkpoint: {{every_steps: 3, keep_best: 0}}
  evaluation: {{tasks: [], dashboard: false, sample_prompt: ""}}
  lut: {{dtype: bfloat16}}
seeds: [0]
baseline: dense
smallest_difference: 0.01
arms:
  dense: {{overrides: {{model: {{num_experts: 0, expert_intermediate_size: 0}}}}}}
  mole: {{}}
further_arms:
  broken: {{overrides: {{model: {{init_std: 1e30}}}}}}
"""


@pytest.fixture
def place(tmp_path: Path, cache_dir: Path) -> "Place":
    return Place(tmp_path, cache_dir)


class Place:
    """A folder with a study and its runs."""

    def __init__(self, folder: Path, cache_dir: Path) -> None:
        self.folder, self.runs = folder, folder / "runs" / "studies" / "tiny"
        self.study: Study = write_study(folder / "tiny", DEFINITION)
        files = f"data.files=[{STDLIB}/json/*.py,{STDLIB}/email/*.py,{STDLIB}/http/*.py]"
        self._overrides = [*SMALL, files, f"data.cache_dir={cache_dir}", "trainer.val_check_interval=8"]

    def start(self, *arguments: str) -> "Popen[str]":
        command = [sys.executable, "-m", "src.study", "--study", str(self.study.path), *arguments, *self._overrides]
        return Popen(
            [*command, f"output_dir={self.folder}/runs"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str) -> tuple[int, str]:
        process = self.start(*arguments)
        _, errors = process.communicate(timeout=600)
        return process.returncode, errors

    def rows(self) -> list[Row]:
        return read_rows(self.study.results_path)

    def wait_for(self, pattern: str) -> None:
        deadline = time.monotonic() + 300
        while not list(self.runs.glob(pattern)):
            assert time.monotonic() < deadline, f"no {pattern}"
            time.sleep(0.05)


@dataclass(frozen=True)
class Finished:
    """How a study ended that nothing disturbed."""

    place: Place
    code: int
    errors: str
    rows: Sequence[Row]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Finished:
    place = Place(tmp_path_factory.mktemp("finished"), cache_dir)
    code, errors = place.run("--jobs", "2")
    return Finished(place, code, errors, place.rows())


def without_seconds(rows: Sequence[Row]) -> list[str]:
    return [str(replace(row, seconds=0.0)) for row in rows]


def test_a_row_is_what_the_run_measured(trained: RunResult, tmp_path: Path) -> None:
    study = write_study(tmp_path / "tiny", DEFINITION)
    (cell,) = reported_cells(study, Choice(arms=["mole"]))
    run, report = RunDirectory(trained.run_dir), trained.report
    config = load_run_config(run)
    row = measure(run, cell, config, prepare_corpus(config.data))
    assert report is not None
    assert report.lookup_form is not None
    assert report.table is not None
    assert (row.arm, row.seed, row.value, row.config) == ("mole", 0, "", config_digest(config))
    assert (row.held_out_loss, row.bits_per_byte) == (report.training_form.loss, report.training_form.bits_per_byte)
    assert row.lookup_loss == report.lookup_form.loss
    assert min(row.zeroed_loss, row.permuted_loss) > row.held_out_loss + 0.01
    assert row.bytes_per_token == report.table.bytes_per_token
    assert row.offloaded_parameters * 4 == report.table.table_bytes
    assert row.tokens == 120 * 8 * 64
    assert sum(row.windows) / len(row.windows) == pytest.approx(row.held_out_loss, abs=1e-4)
    assert [step for step, _ in row.curve_points] == [30, 60, 90, 120]
    per_token = row.training_flops / row.tokens / row.trained_parameters
    assert 1 < per_token < 6  # 6 if every weight were used at every position
    recorded = json.loads(run.report_path.read_text())["machine"]
    assert (row.threads, row.machine) == (recorded["threads"], recorded["accelerator"] or recorded["processor"])


def test_a_cell_is_named_after_its_arm_and_seed(tmp_path: Path) -> None:
    arm = write_study(tmp_path / "tiny", DEFINITION).arms["mole"]
    assert (Cell(arm, 3).name, Cell(arm, 100, "2e-3").name) == ("mole-s3", "mole-2e-3-s100")


def test_a_cell_is_accounted_with_the_micro_batches_and_the_table_that_it_will_have() -> None:
    def cost(*overrides: str) -> Cost:
        return cost_of(load_config(CONFIGS / "quickstart.yaml", overrides))

    assert cost("data.micro_batch_size=5") == cost("data.micro_batch_size=4")
    assert cost("data.micro_batch_size=4096") == cost("data.micro_batch_size=16")
    assert cost().disk_bytes - cost("lut.dtype=bfloat16").disk_bytes == 32 * 2**20  # half of the quick start's table


@pytest.mark.release
@pytest.mark.slow
def test_a_study_runs_what_is_missing_and_names_what_failed(finished: Finished) -> None:
    place, rows, errors = finished.place, finished.rows, finished.errors
    assert finished.code == 1, errors
    assert re.search(r"no result: broken-s0: exit code \d: .*optimizer.learning_rate", errors), errors
    assert [row.key for row in rows] == [("dense", 0, ""), ("mole", 0, "")]
    assert rows[0].corpus == rows[1].corpus
    assert rows[0].threads == rows[1].threads == max(1, len(os.sched_getaffinity(0)) // 2)
    assert "No result yet: broken-s0." in place.study.page_path.read_text()
    before = {path: path.stat().st_mtime_ns for path in place.runs.glob("*-s0/report.json")}
    shutil.rmtree(place.runs / "dense-s0")
    code, errors = place.run("--arms", "dense,mole")
    assert (code, place.rows()) == (0, rows)
    assert not (place.runs / "dense-s0").exists(), "a row is a finished cell, also without its run"
    assert (place.runs / "mole-s0" / "report.json").stat().st_mtime_ns == before[place.runs / "mole-s0/report.json"]

    place.study.results_path.unlink()
    code, errors = place.run("--arms", "mole")
    assert (code, without_seconds(place.rows())) == (0, without_seconds(rows[1:])), "a run is a finished cell, too"

    code, errors = place.run("--arms", "mole", "optimizer.learning_rate=1e-3")
    assert code == 2
    assert "results.csv: mole-s0: is a result of config" in errors
    assert "--rerun" in errors
    code, errors = place.run("--arms", "mole", "--jobs", "2", "--rerun")
    assert (code, without_seconds(place.rows())) == (0, without_seconds(rows[1:])), "the same loss to every digit"


@pytest.mark.release
@pytest.mark.slow
def test_a_killed_study_ends_with_the_same_results(place: Place, finished: Finished, attacks: int) -> None:
    moments = random.Random(0)
    for _ in range(attacks):
        process = place.start("--arms", "dense,mole", "--jobs", "2")
        time.sleep(moments.uniform(5, 15))
        process.kill()
        process.communicate()
    code, errors = place.run("--arms", "dense,mole", "--jobs", "2")
    assert code == 0, errors
    assert without_seconds(place.rows()) == without_seconds(finished.rows)


@pytest.mark.release
@pytest.mark.slow
def test_an_interrupted_study_ends_its_cells_with_checkpoints(place: Place) -> None:
    process = place.start("--arms", "mole", "trainer.max_steps=2000")
    place.wait_for("mole-s0/checkpoints/*.ckpt")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    newest = max(place.runs.glob("mole-s0/checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    assert time.time() - newest.stat().st_mtime < 60
    os.close(open_locked(place.runs / ".lock"))  # which a cell would hold
