"""The verbs, as a user meets them: what they do with runs and tables, and what they print."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from src import evaluate, generate, reparameterize, train, verify
from src.data.tokenizer import fingerprint, load_tokenizer
from src.errors import LutError, UserError
from src.lut import LutStore, build_lut, read_manifest
from src.lut.scan import read_token_counts
from src.run_directory import RunDirectory
from src.train import RunResult
from tests.conftest import CONFIGS

ROOT = CONFIGS.parent


def test_verbs_start_without_what_only_training_or_drawing_needs() -> None:
    names = "train evaluate generate reparameterize verify convert export inspect_lut prepare_data"
    verbs = ", ".join(f"src.{verb}" for verb in names.split())
    unwanted = ("lightning", "torchmetrics", "matplotlib", "wandb", "datasets", "lm_eval", "scipy")
    code = f"import sys, {verbs}; print([name for name in {unwanted} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"


def test_training_says_where_a_device_takes_less_at_a_time_than_it_may(
    small_overrides: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["trainer.max_steps=1", "evaluation.at_fit_end=false", "evaluation.dashboard=false", "lut.at_fit_end=false"]
    for micro, is_told in ((3, True), (16, False)):
        train.main([*small_overrides, *short, f"data.micro_batch_size={micro}", f"output_dir={tmp_path}"])
        told = "data.micro_batch_size: 3 does not divide the 8 windows that each device takes in a step, so it takes 2"
        assert (told in capsys.readouterr().err) == is_told


def test_training_prints_nothing_of_lightnings_own_remarks(small_overrides: Sequence[str], tmp_path: Path) -> None:
    short = ["trainer.max_steps=2", "trainer.enable_progress_bar=false", "evaluation.at_fit_end=false"]
    arguments = [*small_overrides, *short, f"output_dir={tmp_path}", "wandb.mode=disabled"]
    command = [sys.executable, "-m", "src.train", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert [line for line in done.stderr.splitlines() if "━" not in line and line.strip()] == []  # bars alone


def test_generate_needs_only_config_tokenizer_backbone_and_table(
    trained: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("config.yaml", "tokenizer.json", "backbone.safetensors"):
        shutil.copy(trained.run_dir / name, moved / name)
    shutil.copytree(trained.run_dir / "lut", moved / "lut")
    texts: list[str] = []
    for run, experts in ((trained.run_dir, "ffn"), (moved, "lut"), (moved, "auto")):
        for sampling in (["--temperature", "0"], ["--temperature", "0.8", "--seed", "3", "--top-p", "0.9"]):
            arguments = ["--run", str(run), "--experts", experts, "--prompt", "import os", "--max-new-tokens", "40"]
            generate.main([*arguments, *sampling])
            texts.append(capsys.readouterr().out)
    assert texts[0] == texts[2] == texts[4]
    assert texts[1] == texts[3] == texts[5]
    assert texts[0].startswith("import os")
    with pytest.raises(UserError, match=r"experts.safetensors: missing, so this run has no training form"):
        generate.main(["--run", str(moved), "--experts", "ffn", "--prompt", "x"])


def test_a_run_without_a_manifest_or_with_another_models_table_is_refused(trained: RunResult, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run_dir, run)
    manifest = run / "lut" / "manifest.json"
    text = manifest.read_text()
    manifest.unlink()
    with pytest.raises(UserError, match=r"manifest.json: missing, so the table is unfinished"):
        generate.main(["--run", str(run), "--experts", "lut", "--prompt", "x"])
    manifest.write_text(text)
    weights = RunDirectory(run)
    state = {**load_file(weights.backbone_path), **load_file(weights.experts_path)}
    state["norm.weight"] = state["norm.weight"] + 1
    weights.write_weights(state)
    with pytest.raises(UserError, match=r"was built for backbone [0-9a-f]+, but this run's is [0-9a-f]+; rebuild"):
        generate.main(["--run", str(run), "--experts", "lut", "--prompt", "x"])


def test_an_empty_prompt_is_refused(trained: RunResult) -> None:
    with pytest.raises(UserError, match="the prompt is empty"):
        generate.main(["--run", str(trained.run_dir), "--prompt", ""])


def test_evaluate_scores_both_forms_alike(
    trained: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores: list[float] = []
    for experts in ("ffn", "lut"):
        evaluate.main(["--run", str(trained.run_dir), "--experts", experts, "--json", str(tmp_path / "score.json")])
        scores.append(json.loads((tmp_path / "score.json").read_text())["loss"])
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert trained.report is not None
    assert scores[0] == pytest.approx(trained.report.training_form.loss, abs=1e-6)
    assert "zlib -9" in capsys.readouterr().out


def test_verify_holds_and_finds_what_is_wrong(trained: RunResult, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run_dir, run)
    plot = tmp_path / "precisions.png"
    verify.main(["--run", str(run), "--json", str(tmp_path / "proof.json"), "--plot", str(plot)])
    assert plot.read_bytes().startswith(b"\x89PNG")
    checks = {check["name"]: check for check in json.loads((tmp_path / "proof.json").read_text())}
    assert all(check["holds"] is not False for check in checks.values())
    assert checks["logits through memmap"]["values"]["max_abs"] <= 5e-5
    assert checks["control: rows replaced by zeros"]["values"]["rise"] > 0
    assert checks["control: rows permuted over ids"]["values"]["rise"] > 0
    shard = run / "lut" / "rows-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(SystemExit) as exit_:
        verify.main(["--run", str(run), "--json", str(tmp_path / "proof.json")])
    assert exit_.value.code == 1
    (check,) = json.loads((tmp_path / "proof.json").read_text())
    assert check["holds"] is False
    assert "token id" in check["found"]


def test_verify_without_a_training_form_proves_what_is_left(trained: RunResult, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run_dir, run)
    (run / "experts.safetensors").unlink()
    verify.main(["--run", str(run), "--json", str(tmp_path / "proof.json")])
    checks = json.loads((tmp_path / "proof.json").read_text())
    assert any(check["found"] == "the run holds no training form" for check in checks)
    assert any(check["name"] == "logits through pread" and check["holds"] for check in checks)


def test_reparameterize_builds_another_precision(trained: RunResult, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run_dir, run)
    reparameterize.main(["--run", str(run), "--dtype", "bfloat16", "--lut", "lut-bf16"])
    verify.main(["--run", str(run), "--lut", "lut-bf16", "--json", str(tmp_path / "proof.json")])
    with pytest.raises(UserError, match=r"lut-bf16: holds a finished table; choose another --lut name"):
        reparameterize.main(["--run", str(run), "--dtype", "float16", "--lut", "lut-bf16"])
    reparameterize.main(["--run", str(run), "--dtype", "float16", "--lut", "lut-bf16", "--overwrite"])


def test_a_table_is_recoded_without_the_training_form(
    trained: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run_dir, run)
    reparameterize.main(["--run", str(run), "--dtype", "int8", "--lut", "direct"])
    (run / "experts.safetensors").unlink()
    with pytest.raises(UserError, match=r"experts.safetensors: missing, so this run holds no training form"):
        reparameterize.main(["--run", str(run), "--dtype", "int8", "--lut", "recoded"])
    recode = ["--run", str(run), "--from-lut", "lut", "--dtype", "int8", "--lut", "recoded"]
    reparameterize.main([*recode, "--dry-run"])
    assert "MiB of disk (fits" in capsys.readouterr().err
    assert not (run / "recoded").exists()
    reparameterize.main(recode)
    shard = "rows-00000.safetensors"
    assert (run / "recoded" / shard).read_bytes() == (run / "direct" / shard).read_bytes()
    with pytest.raises(UserError, match=r"lut-nf9: no such table"):
        reparameterize.main(["--run", str(run), "--from-lut", "lut-nf9", "--lut", "x"])


def test_a_checkpoint_becomes_a_run(trained: RunResult, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "tokenizer.json"):
        shutil.copy(trained.run_dir / name, run / name)
    shutil.copytree(trained.run_dir / "checkpoints", run / "checkpoints")
    reparameterize.main(["--run", str(run), "--checkpoint", "last", "--dtype", "float32"])
    assert RunDirectory(run).identity() == RunDirectory(trained.run_dir).identity()
    shard = "lut/rows-00000.safetensors"
    assert (run / shard).read_bytes() == (trained.run_dir / shard).read_bytes()
    with pytest.raises(UserError, match=r"first: no such checkpoint; this run has best, last"):
        reparameterize.main(["--run", str(run), "--checkpoint", "first"])


def test_ids_outside_the_vocabulary_are_refused_by_name(trained: RunResult) -> None:
    with LutStore.open(trained.run_dir / "lut") as store:
        for bad in (-1, 512):
            with pytest.raises(IndexError, match=rf"token id {bad} is outside the table's vocabulary \[0, 512\)"):
                store.gather(torch.tensor([3, bad]))


def test_a_table_is_not_made_of_itself(trained: RunResult, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run_dir, run)
    before = (run / "lut" / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="is the table that the rows come from; give the new one another --lut name"):
        reparameterize.main(["--run", str(run), "--from-lut", "lut", "--dtype", "int8", "--overwrite"])
    assert (run / "lut" / "manifest.json").read_bytes() == before


def test_a_table_that_training_left_unfinished_is_finished_as_it_was_begun(
    trained: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run_dir, run)
    shutil.rmtree(run / "lut")
    counts = torch.from_numpy(read_token_counts(trained.run_dir / "lut", read_manifest(trained.run_dir / "lut")))
    identity = load_tokenizer(run / "tokenizer.json")
    with monkeypatch.context() as patch:
        patch.setattr("src.lut.builder.encode_chunk", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            build_lut(run, run / "lut", dtype="float32", token_counts=counts, tokenizer=fingerprint(identity))
    reparameterize.main(["--run", str(run), "--resume", "--memory-mb", "1"])
    for path in sorted((trained.run_dir / "lut").iterdir()):
        assert (run / "lut" / path.name).read_bytes() == path.read_bytes(), path.name
    monkeypatch.setattr("src.lut.builder.prepare", _interrupted)
    reparameterize.main(["--run", str(run), "--resume"])  # finds nothing to do


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_no_room_for_a_new_table_leaves_the_old_one(
    trained: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run_dir, run)

    def full(*_: object) -> None:
        raise LutError("the table needs more bytes than are free")

    monkeypatch.setattr("src.lut.builder.require_space", full)
    with pytest.raises(LutError, match="more bytes than are free"):
        reparameterize.main(["--run", str(run), "--dtype", "float32", "--overwrite"])
    with LutStore.open(run / "lut") as store:
        store.gather(torch.arange(4))


def test_a_table_that_cannot_be_opened_leaves_no_file_open(trained: RunResult, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run_dir, run)
    (run / "lut" / "token_counts.safetensors").write_bytes(b"damaged")
    open_files = psutil.Process().num_fds()
    with pytest.raises(LutError, match=r"token_counts.safetensors: missing or not what the manifest lists"):
        LutStore.open(run / "lut", cache_mb=1)
    assert psutil.Process().num_fds() <= open_files
    reparameterize.main(["--run", str(run), "--dtype", "float32", "--overwrite"])  # which does not trust them either
    LutStore.open(run / "lut", cache_mb=1).close()
