"""The scores of an exported model by lm-eval's own command are those that `src.evaluate` gives the run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

import lm_eval  # pyright: ignore[reportMissingImports]

from src import evaluate
from src.config import load_run_config
from src.evaluation.harness import HarnessModel
from src.evaluation.held_out import held_out_of_run
from src.evaluation.likelihood import TextModel
from src.inference import load_model
from src.interop import export_huggingface
from src.run_directory import RunDirectory
from src.system.console import no_progress
from src.train import RunResult
from tests.evaluation.harness_rows import sciq, wikitext, write

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("lm-eval command")]  # which runs once

DEFINITIONS = {
    "sciq": "sciq/sciq.yaml",
    "wikitext": "wikitext/wikitext.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
}
"""A task of several choices, one of whole texts and one of single continuations, as lm-eval has them."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write(folder, "sciq.test.jsonl", sciq(9))
    write(folder, "wikitext.test.jsonl", wikitext(4))
    write(
        folder, "lambada_openai.test.jsonl", [{"text": f"the owl hoots and the owl number {n} hoots"} for n in range(5)]
    )
    return folder


@pytest.fixture(scope="module")
def theirs(trained: RunResult, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where lm-eval's command has written results and samples of the exported run."""
    work = tmp_path_factory.mktemp("work")
    export_huggingface(trained.run_dir, work / "folder")
    (work / "tasks").mkdir()
    for name, definition in DEFINITIONS.items():
        task = {
            "include": str(Path(lm_eval.__file__).parent / "tasks" / definition),
            "task": f"{name}_here",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"test": str(rows / f"{name}.test.jsonl")}},
            "test_split": "test",
            "training_split": None,
            "validation_split": None,
        }
        (work / "tasks" / f"{name}.yaml").write_text(json.dumps(task))
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "4"]
    command += ["--model_args", f"pretrained={work / 'folder'},trust_remote_code=True,dtype=float32,max_length=128"]
    command += ["--tasks", ",".join(f"{name}_here" for name in DEFINITIONS), "--include_path", str(work / "tasks")]
    command += ["--output_path", str(work / "out"), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return work / "out"


@pytest.fixture(scope="module")
def ours(trained: RunResult, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """Figures by task that `src.evaluate` writes of the run itself, its table on disk."""
    output = tmp_path_factory.mktemp("ours") / "scores.json"
    tasks = ",".join(DEFINITIONS)
    evaluate.main(["--run", str(trained.run_dir), "--tasks", tasks, "--local-data", str(rows), "--json", str(output)])
    return json.loads(output.read_text())["tasks"]


def samples(theirs: Path, task: str) -> list[dict[str, Any]]:
    (path,) = theirs.rglob(f"samples_{task}_here_*.jsonl")
    return sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])


@pytest.mark.parametrize("task", DEFINITIONS)
def test_log_likelihoods_agree(task: str, trained: RunResult, theirs: Path) -> None:
    run = RunDirectory(trained.run_dir)
    rule = held_out_of_run(run, load_run_config(run).data)[0].rule
    with load_model(trained.run_dir) as model:
        here = HarnessModel(TextModel(model, rule, max_length=128, progress=no_progress))
        for sample in samples(theirs, task):
            requests = [SimpleNamespace(args=tuple(arguments.values())) for arguments in sample["arguments"].values()]
            answers = [answer for (answer,) in sample["resps"]]
            if task == "wikitext":
                assert here.loglikelihood_rolling(requests) == pytest.approx([float(a) for a in answers], rel=1e-5)
                continue
            found = here.loglikelihood(requests)
            assert [value for value, _ in found] == pytest.approx([float(a[0]) for a in answers], rel=1e-5)
            assert [str(greedy) for _, greedy in found] == [str(a[1]) for a in answers]
            if task == "sciq":  # the choice that is right is the last
                choices = [value for value, _ in found]
                assert (choices.index(max(choices)) == len(choices) - 1) == bool(sample["acc"])


@pytest.mark.parametrize("task", DEFINITIONS)
def test_metrics_agree(task: str, theirs: Path, ours: dict[str, dict[str, float]]) -> None:
    (path,) = theirs.rglob("results_*.json")
    results = json.loads(path.read_text())["results"][f"{task}_here"]
    found = {key.partition(",")[0]: value for key, value in results.items() if key.endswith(",none")}
    numbers = {metric: value for metric, value in found.items() if isinstance(value, float)}
    assert {"sciq": "acc", "wikitext": "bits_per_byte", "lambada_openai": "perplexity"}[task] in numbers
    for metric, value in numbers.items():
        is_drawn = metric == "perplexity_stderr"  # from random samples of the documents
        assert ours[task][metric] == pytest.approx(value, rel=0.5 if is_drawn else 1e-5, abs=1e-12), metric
