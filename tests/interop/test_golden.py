"""The authors' numbers, from their checkpoints, through the command line: training form, table, disk."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from src.convert import main
from src.inference import generate, load_model
from src.inference.disk_experts import DiskExperts
from src.lut import build_lut, read_manifest
from src.model import Transformer
from tests.interop.checkpoints import (
    GOLDEN,
    NAMES,
    Writer,
    golden_config,
    golden_numbers,
    golden_tensors,
    write_checkpoint,
    write_pickle,
    write_sharded,
)

TOLERANCE = 2e-5


def convert(checkpoint: Path, run: Path) -> Path:
    main(["--from", "official", "--input", str(checkpoint), "--output", str(run)])
    return run


@torch.no_grad()
def check(model: Transformer, golden: dict[str, Tensor]) -> None:
    """Compare logits and greedy continuation."""
    torch.testing.assert_close(model(golden["input_ids"]), golden["logits"], rtol=0, atol=TOLERANCE)
    found = generate(model, golden["input_ids"][:1], max_new_tokens=12)
    assert torch.equal(found, golden["greedy"])


@pytest.mark.parametrize("name", ["dense", "moe_top2", "mole"])
def test_training_form(name: str, tmp_path: Path) -> None:
    with load_model(convert(GOLDEN / name, tmp_path / "run"), experts="ffn") as model:
        assert model.config.architecture == name.partition("_")[0]
        check(model, golden_numbers(name))


def test_table_built_from_the_training_form(tmp_path: Path) -> None:
    run = convert(GOLDEN / "mole", tmp_path / "run")
    build_lut(run, run / "lut", dtype="float32")
    with load_model(run, experts="lut") as model:
        assert isinstance(model.experts, DiskExperts)
        check(model, golden_numbers("mole"))


@pytest.mark.parametrize("reader", ["auto", "pread", "memmap"])
def test_reparameterised_through_the_disk(reader: str, tmp_path: Path) -> None:
    run = convert(GOLDEN / "mole_rep", tmp_path / "run")
    assert not (run / "experts.safetensors").exists()
    with load_model(run, reader=reader) as model:
        assert isinstance(model.experts, DiskExperts)
        check(model, golden_numbers("mole_rep"))


def test_both_ways_to_a_table_give_the_same_rows(tmp_path: Path) -> None:
    trained, imported = convert(GOLDEN / "mole", tmp_path / "a"), convert(GOLDEN / "mole_rep", tmp_path / "b")
    build_lut(trained, trained / "lut", dtype="float32")
    with load_model(trained, experts="lut") as one, load_model(imported, experts="lut") as other:
        assert isinstance(one.experts, DiskExperts) and isinstance(other.experts, DiskExperts)
        every_id = torch.arange(97)
        torch.testing.assert_close(
            one.experts.store.gather(every_id), other.experts.store.gather(every_id), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("write", [write_sharded, write_pickle])
@pytest.mark.parametrize("name", NAMES)
def test_shards_and_pickles(name: str, write: Writer, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "official", golden_tensors(name), golden_config(name), write)
    with load_model(convert(checkpoint, tmp_path / "run")) as model:
        check(model, golden_numbers(name))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_table_stays_what_it_is(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in golden_tensors("mole_rep").items()}
    checkpoint = write_checkpoint(tmp_path / "official", tensors, golden_config("mole_rep"))
    run = convert(checkpoint, tmp_path / "run")
    assert read_manifest(run / "lut").layout.precision == str(dtype).removeprefix("torch.")
    with load_model(run) as model:
        assert isinstance(model.experts, DiskExperts) and model.head.weight.dtype == dtype
        rows = model.experts.store.gather(torch.arange(97))  # (V, L, E, D)
    assert torch.equal(rows.flatten(1), tensors["model.moe_table.weight"])
