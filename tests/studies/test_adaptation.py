"""Studies whose arms start from a run that the study trains: bases, LoRA, shares of a gain, what is forgotten."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from callbacks.lora import adapted, count_lora
from src.config import load_run_config
from src.errors import ConfigError
from src.inference import load_model
from src.model import Transformer
from src.run_directory import RunDirectory
from src.studies.adaptation import domains, forgotten, shares
from src.studies.cells import Choice, config_digest, places_of, pretraining_cells, reported_cells, runs_root
from src.studies.definition import Study, arm_config, load_study
from src.studies.figures import draw_figures
from src.studies.page import page_text
from src.studies.rows import Row, read_rows
from src.studies.summary import Summary
from tests.conftest import CONFIGS, SMALL, STDLIB
from tests.studies.made_up import row, write_study

DEFINITION = f"""
question: Does it learn the domain?
config: {CONFIGS}/quickstart.yaml
overrides:
  model: {{num_experts: 0, expert_intermediate_size: 0}}
  data: {{files: ["{STDLIB}/email/*.py"]}}
  trainer: {{max_steps: 6, max_time: null, val_check_interval: 3, precision: 32-true}}
  optimizer: {{learning_rate: 1e-2, weight_decay: 0}}
  checkpoint: {{keep_best: 0}}
  evaluation: {{tasks: [], dashboard: false, sample_prompt: ""}}
seeds: [0]
baseline: base
share_of: full
smallest_difference: 0.01
pretraining: {{overrides: {{data: {{files: ["{STDLIB}/json/*.py", "{STDLIB}/http/*.py"]}}}}}}
arms:
  base:
    label: The base
    trained: false
    overrides: &start {{init_from: "${{base}}", data: {{tokenizer: {{path: "${{base}}/tokenizer.json"}}}}}}
  full: {{label: Full, overrides: *start}}
  plug-in:
    label: Plug-in
    like: full
    overrides:
      model: {{num_experts: 2, null_expert: true, expert_layers: [0], expert_intermediate_size: 32}}
      optimizer: {{backbone_multipliers: {{learning_rate: 0}}}}
  lora: {{label: LoRA, like: full, lora_rank: 3}}
hypotheses:
  - {{arm: plug-in, than: base, expect: better, because: It learns.}}
  - {{arm: base, than: full, expect: better, on_general_text: true, because: It forgets.}}
"""


def study(folder: Path, text: str = DEFINITION) -> Study:
    return write_study(folder / "tiny", text)


def run_study(path: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the command in a process of its own: it sets the threads of the one that it runs in."""
    command = [sys.executable, "-m", "src.study", "--study", str(path), *arguments]
    return subprocess.run(command, cwd=CONFIGS.parent, capture_output=True, text=True, check=False)


def test_cells_start_from_the_base_of_their_seed(tmp_path: Path) -> None:
    tiny, choice = study(tmp_path), Choice(overrides=[f"output_dir={tmp_path}"])
    root = runs_root(tiny, choice)
    assert root == tmp_path / "studies" / "tiny"
    cells = reported_cells(tiny, choice)
    assert [cell.name for cell in pretraining_cells(tiny, choice, cells)] == ["pretraining-s0"]
    places = places_of(tiny, choice, 0, root)
    starts = {arm_config(cell.arm, places).init_from for cell in cells}
    assert starts == {str(root / "pretraining-s0")}
    named = Choice(places={"base": "/a/run"})
    assert pretraining_cells(tiny, named, cells) == []
    assert places_of(tiny, named, 0, root) == {"base": "/a/run"}
    digests = {config_digest(arm_config(cell.arm, places), cell.arm) for cell in cells}
    assert len(digests) == len(cells), "what is not trained, and LoRA, are other results than full fine-tuning"


def test_a_base_is_named_where_a_study_trains_none(tmp_path: Path) -> None:
    without = DEFINITION.replace("pretraining:", "notes: ''\n#")
    with pytest.raises(ConfigError, match=r"base: this study starts from a run; name it with base=RUN"):
        arm_config(study(tmp_path, without).arms["full"], {})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("trained: false", "trained: no", "arms.base.trained: 'no', but it must be true or false"),
        ("lora_rank: 3", "lora_rank: 0", "arms.lora.lora_rank: '0', but it must be a whole number above 0"),
        ("share_of: full", "share_of: all", "share_of: 'all', but it must be an arm"),
        ("pretraining: {{overrides", "pretraining: {{override", "did you mean 'pretraining.overrides'"),
        ("  lora:", "  pretraining:", "arms.pretraining: must be a new name"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    changed = DEFINITION.replace(old.replace("{{", "{"), new.replace("{{", "{"))
    assert changed != DEFINITION
    with pytest.raises(ConfigError) as caught:
        study(tmp_path, changed)
    assert message in str(caught.value)


@pytest.mark.slow
def test_a_study_trains_bases_and_what_starts_from_them(tmp_path: Path, cache_dir: Path) -> None:
    tiny, runs = study(tmp_path), tmp_path / "runs" / "studies" / "tiny"
    small = [text for text in SMALL if not text.startswith(("trainer.val_check", "optimizer.warmup"))]
    places = [f"output_dir={tmp_path}/runs", f"data.cache_dir={cache_dir}", "optimizer.warmup_steps=2"]
    done = run_study(tiny.path, "--jobs", "2", *small, *places)
    assert done.returncode == 0, done.stderr
    rows = {found.arm: found for found in read_rows(tiny.results_path)}
    assert list(rows) == ["base", "full", "plug-in", "lora", "pretraining"]
    base, lora = rows["base"], RunDirectory(runs / "lora-s0")
    initial = {name: RunDirectory(runs / f"{name}-s0").record()["initial"]["loss"] for name in list(rows)[1:4]}
    assert all(loss == pytest.approx(base.held_out_loss, abs=1e-6) for loss in initial.values())
    assert base.general_loss == pytest.approx(rows["pretraining"].held_out_loss, abs=1e-6)
    assert rows["full"].held_out_loss < base.held_out_loss
    assert rows["lora"].held_out_loss < base.held_out_loss
    assert {arm for arm, found in rows.items() if math.isfinite(found.loss_after_100)} == {
        "base",
        "full",
        "plug-in",
        "lora",
    }
    config = load_run_config(lora).model
    assert rows["lora"].trained_parameters == count_lora(config, 3) > 0
    assert rows["plug-in"].corpus == base.corpus != rows["pretraining"].corpus

    with load_model(runs / "pretraining-s0", experts="ffn") as before, load_model(lora.path, experts="ffn") as after:
        changed = {
            name for name, weight in before.state_dict().items() if not torch.equal(weight, after.state_dict()[name])
        }
    model = Transformer(config)
    weights = [module.weight for module in adapted(model)]
    assert changed == {name for name, weight in model.named_parameters() if any(weight is each for each in weights)}
    assert RunDirectory(runs / "plug-in-s0").plug_in() is not None

    page = tiny.page_path.read_text(encoding="utf-8")
    assert "Full gains " in page
    assert "## What is forgotten" in page
    kept = tiny.results_path.read_bytes()
    for run in runs.glob("*-s0"):
        run.rename(run.with_name(f"moved-{run.name}"))
    assert run_study(tiny.path, "--jobs", "2", *small, *places).returncode == 0
    assert tiny.results_path.read_bytes() == kept, "results stay, although what they started from is gone"
    assert not (runs / "pretraining-s0").exists()


@pytest.mark.release
@pytest.mark.slow
def test_what_starts_from_a_base_that_failed_is_named(tmp_path: Path, cache_dir: Path) -> None:
    broken = DEFINITION.replace("pretraining: {overrides: {", "pretraining: {overrides: {model: {init_std: 1e30}, ")
    tiny = study(tmp_path, broken)
    places = [f"output_dir={tmp_path}/runs", f"data.cache_dir={cache_dir}", "trainer.max_steps=2"]
    found = run_study(tiny.path, "--arms", "base,full", *SMALL, *places, "trainer.val_check_interval=2")
    errors = found.stderr
    assert found.returncode == 1
    assert "no result: pretraining-s0: exit code" in errors
    assert "no result: base-s0: pretraining-s0, which it starts from, has no result" in errors
    assert "no result: full-s0: pretraining-s0, which it starts from, has no result" in errors


def made_up(arm: str, losses: tuple[float, ...], general: float, **changes: object) -> list[Row]:
    kind = "mole" if arm == "plug-in" else "dense"
    found = [
        row(kind, seed, loss, general_loss=general, general_window_losses=f"{general}")
        for seed, loss in enumerate(losses)
    ]
    return [replace(each, arm=arm, **changes) for each in found]  # type: ignore[arg-type]


def test_the_page_says_shares_what_is_forgotten_and_what_domains_cost(tmp_path: Path) -> None:
    million = 1_000_000
    rows = [
        *made_up("base", (4.0, 4.2), 2.0, trained_parameters=0, resident_parameters=100 * million),
        *made_up("full", (3.0, 3.2), 2.5, trained_parameters=100 * million, resident_parameters=100 * million),
        *made_up("plug-in", (3.5, 3.6), 2.1, resident_parameters=101 * million, offloaded_parameters=50 * million),
        *made_up("lora", (3.2, 3.4), 2.2, trained_parameters=2 * million, resident_parameters=100 * million),
    ]
    summary = Summary(study(tmp_path), rows)
    assert shares(summary).startswith(
        "Full gains 1.0000 ± 0.0000 nats per token over the base. Of that gain: Plug-in 55 ± 5 %; LoRA 80 ± 0 %."
    )
    assert "| Plug-in | 3.5500 | +0.5500 ± 0.0500 | 2.1000 | +0.1000 ± 0.0000 |" in forgotten(summary)
    table = domains(summary)
    assert "| The base | 200.00 MB | 200.00 MB |  | 0 |" in table
    assert "| Full | 200.00 MB | 2000.00 MB | 200.00 MB | 0 |" in table
    assert "| Plug-in | 202.00 MB | 220.00 MB | 100.00 MB | 0 |" in table
    assert "| LoRA | 200.00 MB | 240.00 MB | 4.00 MB | 0 |" in table
    assert "| The base against Full, on general text. It forgets. | better | better | **holds** |" in page_text(summary)
    assert [path.name for path in draw_figures(summary, tmp_path)] == ["curves.png", "forgetting.png"]
    assert shares(Summary(load_study(study(tmp_path / "other").path), [])) == ""
