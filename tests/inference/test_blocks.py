"""Blocks that differ from the paper's, from the run directory to generated text, in both forms."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from src.inference import generate, load_model
from src.lut import build_lut
from src.model import KeyValueCache, ModelConfig
from src.run_directory import RunDirectory, identify_weights
from tests.inference.runs import CONFIG, prompts, write_run
from tests.model.models import BLOCKS

RUNS = {block: replace(CONFIG, **{**settings, "head_dim": 12}) for block, settings in BLOCKS.items()}


@pytest.mark.parametrize("config", RUNS.values(), ids=RUNS.keys())
def test_both_forms_write_the_same_text_as_the_full_forward(config: ModelConfig, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", config=config)
    with load_model(run, experts="lut") as lookup, load_model(run, experts="ffn") as training:
        found = generate(lookup, prompts(3, 9), max_new_tokens=20)
        assert torch.equal(found, generate(training, prompts(3, 9), max_new_tokens=20))
        with torch.no_grad():
            best = training(found).argmax(dim=-1)
        assert torch.equal(best[:, 8:-1], found[:, 9:])


def test_a_table_is_the_same_from_a_model_and_from_its_run(tmp_path: Path) -> None:
    run = RunDirectory(write_run(tmp_path / "run", config=RUNS["everything"]))
    with load_model(run.path, experts="ffn") as model:
        identity = identify_weights(load_file(run.backbone_path) | load_file(run.experts_path))
        assert build_lut(model, tmp_path / "lut", dtype="float32").training_form == identity.training_form
    for path in run.lut_path().glob("rows-*.safetensors"):
        assert path.read_bytes() == (tmp_path / "lut" / path.name).read_bytes()


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    run = RunDirectory(write_run(tmp_path / "run", config=RUNS["smollm"]))
    assert "head.weight" not in load_file(run.backbone_path)
    with load_model(run.path, dtype=torch.bfloat16) as model:
        assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_holds_the_heads_of_keys_and_values_alone(dtype: torch.dtype) -> None:
    config = replace(CONFIG, num_heads=8, num_kv_heads=2, head_dim=6)
    cache = KeyValueCache(config, 3, 10, device=torch.device("cpu"), dtype=dtype)
    assert cache.keys.shape == cache.values.shape == (3, 3, 2, 10, 6)
    assert len(cache.scratch) == (3 * 2 * 10 * 6 if dtype == torch.bfloat16 else 0)
