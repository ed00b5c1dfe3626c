"""Training that starts from another run's weights, and every reason to refuse it."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from src.data.tokenizer import load_tokenizer, train_bpe
from src.errors import RunError
from src.model import Transformer
from src.model.config import RopeScaling
from src.run_directory import RunDirectory
from src.train import RunResult, train
from src.training.resume import start_from_run
from tests.conftest import small_config


@pytest.fixture
def run(trained: RunResult) -> RunDirectory:
    return RunDirectory(trained.run_dir)


@pytest.fixture
def tokenizer(run: RunDirectory) -> Tokenizer:
    return load_tokenizer(run.tokenizer_path)


def test_every_weight_is_the_runs(run: RunDirectory, tokenizer: Tokenizer) -> None:
    model = Transformer(replace(run.model_config(), top_k=2))  # how many are active may change
    start_from_run(model, run, tokenizer)
    written = load_file(run.backbone_path) | load_file(run.experts_path)
    found = model.state_dict()
    assert found.keys() == written.keys()
    assert all(torch.equal(found[name], written[name]) for name in written)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_training_goes_on_from_the_run_with_a_new_schedule(
    run: RunDirectory, small_overrides: Sequence[str], tmp_path: Path
) -> None:
    config = small_config(
        small_overrides,
        tmp_path,
        f"init_from={run.path}",
        "trainer.precision=32-true",
        "trainer.max_steps=2",
        "optimizer.schedule=constant",
        "optimizer.learning_rate=1e-9",
        "evaluation.at_fit_end=false",
    )
    continued = RunDirectory(train(config).run_dir)
    before, after = load_file(run.backbone_path), load_file(continued.backbone_path)
    changes = [(after[name] - before[name]).abs().max().item() for name in before]
    assert 0 < max(changes) < 1e-7


def test_a_model_of_another_shape_is_refused_and_what_differs_is_named(run: RunDirectory, tokenizer: Tokenizer) -> None:
    other = Transformer(replace(run.model_config(), num_layers=3, num_experts=2))
    with pytest.raises(RunError) as caught:
        start_from_run(other, run, tokenizer)
    assert str(caught.value) == (
        f"init_from: {run.path} holds another model (model.num_layers 2 there, 3 here; model.num_experts 4 there, "
        "2 here); set these keys to the run's values, or start from a run of this shape"
    )


def test_heads_of_another_number_are_refused_though_every_shape_fits(run: RunDirectory, tokenizer: Tokenizer) -> None:
    with pytest.raises(RunError, match=r"model.num_heads 2 there, 4 here"):
        start_from_run(Transformer(replace(run.model_config(), num_heads=4)), run, tokenizer)


@pytest.mark.parametrize(
    "values",
    [{"num_kv_heads": 1}, {"head_dim": 8}, {"activation": "swiglu"}, {"tie_embeddings": True}],
    ids=lambda values: next(iter(values)),
)
@pytest.mark.parametrize("scaled", [False, True], ids=["", "rope_scaling"])
def test_another_block_is_refused_by_its_key(
    run: RunDirectory, tokenizer: Tokenizer, values: dict[str, Any], scaled: bool
) -> None:
    values = {"rope_scaling": RopeScaling()} if scaled else values
    with pytest.raises(RunError, match=f"holds another model \\(model.{next(iter(values))} "):
        start_from_run(Transformer(replace(run.model_config(), **values)), run, tokenizer)


@pytest.mark.parametrize(("key", "there"), [("rope_theta", 10000.0), ("norm_eps", 1e-05)])
def test_a_model_that_computes_another_function_of_the_same_weights_is_refused(
    run: RunDirectory, tokenizer: Tokenizer, key: str, there: float
) -> None:
    other = Transformer(replace(run.model_config(), **{key: 0.5}))
    with pytest.raises(RunError, match=rf"holds another model \(model.{key} {there} there, 0.5 here\)"):
        start_from_run(other, run, tokenizer)


def test_a_run_without_its_training_form_is_refused(run: RunDirectory, tokenizer: Tokenizer, tmp_path: Path) -> None:
    lookup_only = RunDirectory(tmp_path / "copy")
    shutil.copytree(run.path, lookup_only.path, ignore=shutil.ignore_patterns("experts.safetensors", "checkpoints"))
    with pytest.raises(RunError, match=r"experts.safetensors is missing, so this run holds only its lookup form"):
        start_from_run(Transformer(run.model_config()), lookup_only, tokenizer)


def test_another_tokenizer_is_refused_with_the_key_to_set(run: RunDirectory) -> None:
    other = train_bpe(iter(["nothing in common with the run"]), vocab_size=300)
    with pytest.raises(RunError, match=rf"set data.tokenizer.path={run.tokenizer_path}"):
        start_from_run(Transformer(run.model_config()), run, other)


def test_a_missing_run_is_refused_before_a_directory_is_claimed(small_overrides: Sequence[str], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nowhere: no such run directory"):
        train(small_config(small_overrides, tmp_path / "runs", f"init_from={tmp_path / 'nowhere'}"))
    assert not (tmp_path / "runs").exists()
