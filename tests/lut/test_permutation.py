"""Experts that read embeddings of other ids: their tables, in both ways of building, and what refuses them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from src.errors import CheckpointError, ConfigError, LutMismatchError
from src.inference import load_model
from src.interop import export_official
from src.lut import build_lut
from src.lut.manifest import read_manifest
from src.model import ModelConfig, Transformer
from src.run_directory import RunDirectory
from tests.inference.runs import CONFIG, prompts, write_run

PERMUTED, SHARED = replace(CONFIG, expert_permutation=3), replace(CONFIG, shared_expert_row=True)


def permuted_run(path: Path, config: ModelConfig = PERMUTED) -> RunDirectory:
    """Give a random run's config the key, and build its table again."""
    run = RunDirectory(write_run(path))
    run.write_config({"model": config.to_dict()})
    build_lut(run, run.lut_path("permuted"), dtype="float32")
    return run


@pytest.mark.parametrize("config", [PERMUTED, SHARED], ids=["permuted", "shared"])
def test_both_forms_and_both_builds_agree(config: ModelConfig, tmp_path: Path) -> None:
    run = permuted_run(tmp_path / "run", config)
    with load_model(run.path, experts="ffn") as computed, load_model(run.path, lut="permuted", experts="lut") as read:
        logits = computed(prompts(4, 20))
        torch.testing.assert_close(read(prompts(4, 20)), logits, rtol=0, atol=5e-5)
        build_lut(computed, tmp_path / "from-model", dtype="float32")
    shards = [
        (path / "rows-00000.safetensors").read_bytes() for path in (run.lut_path("permuted"), tmp_path / "from-model")
    ]
    assert shards[0] == shards[1]
    plain = Transformer(CONFIG)
    plain.load_state_dict(computed.state_dict())
    assert (plain(prompts(4, 20)) - logits).abs().max() > 0.1


def test_a_table_knows_the_permutation(tmp_path: Path) -> None:
    run = permuted_run(tmp_path / "run")
    noted = "experts in float32, which read embeddings permuted with seed 3"
    assert read_manifest(run.lut_path("permuted")).rows_from == noted
    with pytest.raises(LutMismatchError, match=r"rows are from experts in float32, but .* model.expert_permutation 3"):
        load_model(run.path, experts="lut")
    build_lut(run.lut_path("permuted"), run.lut_path("again"), dtype="bfloat16")
    load_model(run.path, experts="lut", lut="again").close()
    run.write_config({"model": CONFIG.to_dict()})
    for name in ("permuted", "again"):
        with pytest.raises(LutMismatchError, match=r"model\.expert_permutation None"):
            load_model(run.path, experts="lut", lut=name)


def test_what_has_no_permutation_refuses_it(tmp_path: Path) -> None:
    run = permuted_run(tmp_path / "run")
    run.write_config({"model": replace(PERMUTED, intermediate_size=40).to_dict()})
    with pytest.raises(CheckpointError, match=r"model.expert_permutation is 3"):
        export_official(run.path, tmp_path / "exported")
    for change in ({"num_experts": 0}, {"expert_input": "hidden"}):
        with pytest.raises(ConfigError, match=r"model.expert_permutation: 3, but this (dense|moe) model"):
            ModelConfig.from_dict({**PERMUTED.to_dict(), **change}, "here")


def test_a_shared_row_is_that_of_every_id(tmp_path: Path) -> None:
    run = permuted_run(tmp_path / "run", SHARED)
    with load_model(run.path, lut="permuted", experts="lut") as model:
        assert model.experts is not None
        rows = model.experts.rows(torch.arange(CONFIG.vocab_size), torch.empty(0))(0)
        assert torch.equal(rows, rows[:1].expand_as(rows))
    assert read_manifest(run.lut_path("permuted")).rows_from.endswith("float32, which read one embedding for all ids")
    run.write_config({"model": CONFIG.to_dict()})
    with pytest.raises(LutMismatchError, match=r"model\.shared_expert_row False"):
        load_model(run.path, experts="lut", lut="permuted")
    with pytest.raises(ConfigError, match=r"model.shared_expert_row: true, but model.expert_permutation is 3"):
        replace(SHARED, expert_permutation=3)
