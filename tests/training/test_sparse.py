"""Training with `model.expert_ids=seen`: which ids have rows, in every way to get there, and what the verbs say."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from src import inspect_lut, reparameterize, train, verify
from src.data.tokenizer import load_tokenizer
from src.errors import RunError
from src.inference import load_model
from src.lut import LutStore, read_manifest
from src.lut.verification import verify_table
from src.model import Transformer
from src.run_directory import RunDirectory
from src.training.checkpoints import CheckpointFiles
from src.training.resume import start_from_run
from tests.conftest import CONFIGS, PLUG_IN, STDLIB, small_config
from tests.distributed.processes import run_ranks
from tests.training.test_resume import resume

SPARSE = (
    "model.expert_ids=seen",
    "model.vocab_size=2048",
    "data.tokenizer.vocab_size=512",
    "data.validation_windows=16",
    "trainer.max_steps=20",
    "trainer.val_check_interval=10",
    "trainer.precision=32-true",
)
ROW_BYTES = 2 * 4 * 64 * 4
"""Layers, experts, hidden size, float32."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, small_overrides: Sequence[str]) -> RunDirectory:
    config = small_config(small_overrides, tmp_path_factory.mktemp("sparse"), *SPARSE)
    return RunDirectory(train.train(config).run_dir)


def row_ids(run: RunDirectory) -> set[int]:
    return set(load_file(run.backbone_path)["has_row"].nonzero().flatten().tolist())


def seen(run: RunDirectory) -> set[int]:
    """Return the ids of a run's own training text."""
    return set(load_file(run.held_out_path)["token_counts"].nonzero().flatten().tolist())


def test_the_ids_of_the_training_text_have_rows_and_no_others(run: RunDirectory) -> None:
    assert 256 < len(seen(run)) < 512
    assert row_ids(run) == seen(run)
    with LutStore.open(run.lut_path()) as store:
        rows = store.gather(torch.arange(2048))
        assert store.row_ids is not None and set(store.row_ids.tolist()) == row_ids(run)
    assert set(rows.flatten(1).any(dim=1).nonzero().flatten().tolist()) == row_ids(run)
    size = sum(path.stat().st_size for path in run.lut_path().iterdir() if path.name != "token_counts.safetensors")
    assert size == pytest.approx(len(row_ids(run)) * ROW_BYTES, rel=0.02)
    assert run.record()["table"]["table_bytes"] == len(row_ids(run)) * ROW_BYTES


def test_verify_compares_like_with_like_and_finds_other_ids(run: RunDirectory, tmp_path: Path) -> None:
    verify.main(["--run", str(run.path)])
    copy = RunDirectory(Path(shutil.copytree(run.path, tmp_path / "copy")))
    path = copy.lut_path() / "row_ids.safetensors"
    data = bytearray(path.read_bytes())
    data[-16] ^= 1
    path.write_bytes(data)
    report = tmp_path / "proof.json"
    with pytest.raises(SystemExit) as left:
        verify.main(["--run", str(copy.path), "--json", str(report)])
    assert left.value.code == 1
    problems = json.loads(report.read_text())[0]["values"]["problems"]
    assert len(problems) == 1 and "row_ids.safetensors: missing or not what the manifest lists" in problems[0]


def test_a_resumed_run_has_the_same_rows(run: RunDirectory, small_overrides: Sequence[str], tmp_path: Path) -> None:
    config = small_config(small_overrides, tmp_path, *SPARSE, "checkpoint.keep_last=2")
    part = RunDirectory(train.train(config).run_dir)
    CheckpointFiles(part.checkpoints_path).path(20).unlink()
    for path in (part.backbone_path, part.experts_path):
        path.unlink()
    shutil.rmtree(part.lut_path())
    resume(part.path)
    assert part.identity() == run.identity()
    for path in run.lut_path().iterdir():
        assert (part.lut_path() / path.name).read_bytes() == path.read_bytes()
    shutil.rmtree(part.lut_path())  # all steps are done, and the table alone is missing
    resume(part.path)
    assert read_manifest(part.lut_path()) == read_manifest(run.lut_path())


def test_tables_are_built_from_the_run_a_checkpoint_and_a_table(run: RunDirectory, tmp_path: Path) -> None:
    copy = RunDirectory(Path(shutil.copytree(run.path, tmp_path / "copy")))
    shutil.rmtree(copy.lut_path())
    arguments = ["--run", str(copy.path), "--lut"]
    reparameterize.main([*arguments, "lut", "--dtype", "float32", "--checkpoint", "last"])
    reparameterize.main([*arguments, "lut-nf4", "--dtype", "nf4"])
    reparameterize.main([*arguments, "lut-int8", "--dtype", "int8", "--from-lut", "lut"])
    assert read_manifest(copy.lut_path()) == read_manifest(run.lut_path())
    for name in ("lut", "lut-nf4", "lut-int8"):
        assert read_manifest(copy.lut_path(name)).layout.sparse_rows == len(row_ids(run))
        assert verify_table(copy.lut_path(name)) == []
    copy.experts_path.unlink()
    verify.main(["--run", str(copy.path)])


def test_inspect_lut_says_that_an_id_has_no_row(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, report = load_tokenizer(run.tokenizer_path), tmp_path / "token.json"
    token_id = tokenizer.encode("\x01").ids[0]
    assert token_id not in row_ids(run)
    inspect_lut.main(["--run", str(run.path), "--token", "\x01", "--json", str(report)])
    assert "has no row in this table, so the experts add nothing for it" in capsys.readouterr().out
    assert json.loads(report.read_text()) == {"token": "\x01", "id": token_id, "occurrences": 0, "rows": []}
    inspect_lut.main(["--run", str(run.path), "--token", "self", "--neighbors", "3", "--json", str(report)])
    found = json.loads(report.read_text())["rows"]
    assert len(found) == 8
    assert {neighbor["id"] for entry in found for neighbor in entry["neighbors"]} <= row_ids(run)


def test_a_run_that_starts_from_another_adds_the_ids_of_its_own_text(
    run: RunDirectory, small_overrides: Sequence[str], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\x01\x02\x03 self def return import " * 2000)
    kept = [override for override in small_overrides if not override.startswith(("model.", "data.files"))]
    more = (f"init_from={run.path}", f"data.files=[{text}]", f"data.tokenizer.path={run.tokenizer_path}")
    model = [f"model.{key}={value}" for key, value in run.model_config().to_dict().items() if key in STATED]
    started = RunDirectory(train.train(small_config(kept, tmp_path, *SPARSE[3:], *model, *more)).run_dir)
    assert seen(started) - row_ids(run) and row_ids(run) - seen(started)
    assert row_ids(started) == row_ids(run) | seen(started)
    other = Transformer(replace(run.model_config(), expert_ids="all"))
    with pytest.raises(RunError, match=r"model\.expert_ids seen there, all here"):
        start_from_run(other, run, load_tokenizer(run.tokenizer_path))


def test_a_sparse_plug_in_adds_nothing_to_its_base_for_ids_of_other_text(
    dense_run: RunDirectory, small_overrides: Sequence[str], tmp_path: Path
) -> None:
    kept = [override for override in small_overrides if not override.startswith("data.files")]
    more = (*PLUG_IN, f"init_from={dense_run.path}", f"data.tokenizer.path={dense_run.tokenizer_path}")
    more = (*more, "model.expert_ids=seen", f"data.files=[{STDLIB}/json/decoder.py]", "data.validation_windows=8")
    run = RunDirectory(train.train(small_config(kept, tmp_path, *more)).run_dir)
    others = sorted(set(range(512)) - row_ids(run))
    unknown, mixed = torch.tensor([others[:64]]), torch.tensor([[*sorted(row_ids(run))[:32], *others[:32]]])
    assert row_ids(run) == seen(run) and run.plug_in() is not None
    verify.main(["--run", str(run.path)])
    with load_model(dense_run.path) as model, torch.inference_mode():
        expected, alone = model(unknown), model(mixed)
        for form in ("lut", "ffn"):
            model.attach(run.path, experts=form)
            assert torch.equal(model(unknown), expected)
            assert (model(mixed) - alone).abs().max() > 1e-3
            model.detach()
            assert torch.equal(model(mixed), alone)


STATED = (
    *("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size", "expert_intermediate_size"),
    "max_sequence_length",
)
"""Keys of a run's model that the quick start states otherwise."""


def test_a_dry_run_says_that_a_table_may_be_smaller(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for ids, count in (("all", 0), ("seen", 2)):
        arguments = ["--config", str(CONFIGS / "quickstart.yaml"), "--dry-run", f"model.expert_ids={ids}"]
        train.main([*arguments, "--json", str(tmp_path / ids)])
        assert capsys.readouterr().out.count("(at most)") == count
        assert json.loads((tmp_path / ids).read_text())["expert_ids"] == ids


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [("ddp",), ("fsdp2",), ("fsdp2", "checkpoint.sharded=true")], ids=" ".join)
def test_ranks_write_the_same_rows(
    strategy: tuple[str, ...], run: RunDirectory, small_overrides: Sequence[str], tmp_path: Path
) -> None:
    how = (f"trainer.strategy={strategy[0]}", *strategy[1:], "trainer.devices=2", "data.micro_batch_size=2")
    shared = RunDirectory(tmp_path / "shared")
    config = small_config(small_overrides, tmp_path, *SPARSE, *how, "name=shared", "checkpoint.keep_last=2")
    run_ranks(partial(train.train, config), tmp_path / "logs")
    assert row_ids(shared) == row_ids(run)
    verify.main(["--run", str(shared.path)])
    found = shared.identity()
    shutil.rmtree(shared.lut_path())
    newest = CheckpointFiles(shared.checkpoints_path).path(20)
    shutil.rmtree(newest) if newest.is_dir() else newest.unlink()
    run_ranks(partial(resume, shared.path), tmp_path / "again")
    assert shared.identity() == found
    verify.main(["--run", str(shared.path)])
