"""An imported model trains on: `init_from` brings its shape, its tokenizer and what stands before a text."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from src import train
from src.config import load_config, load_run_config
from src.data.tokenizer import fingerprint, load_tokenizer
from src.errors import ConfigError, RunError
from src.inference import load_model
from src.interop import import_huggingface
from src.interop.qwen3 import QWEN3
from src.model import ModelConfig
from src.run_directory import RunDirectory
from src.train import resumed_config
from tests.conftest import CONFIGS
from tests.interop.checkpoints import write_block_folder

CONTINUE = CONFIGS / "continue.yaml"
MODEL = ModelConfig(
    vocab_size=300,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    intermediate_size=48,
    activation="swiglu",
    qk_norm=True,
    tie_embeddings=True,
    rope_theta=500.0,
    max_sequence_length=96,
)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    path = tmp_path_factory.mktemp("imported")
    write_block_folder(path / "folder", MODEL, QWEN3, torch.bfloat16)
    import_huggingface(path / "folder", path / "run")
    return RunDirectory(path / "run")


@pytest.fixture
def small(small_overrides: Sequence[str], tmp_path: Path) -> list[str]:
    """Settings of a short fit that state nothing of the model and the tokenizer."""
    kept = [item for item in small_overrides if not item.startswith("model.")]
    return [*kept, f"output_dir={tmp_path}", "evaluation.at_fit_end=false", "trainer.precision=32-true"]


def test_one_line_trains_on_with_model_tokenizer_and_prefix(
    imported: RunDirectory, small: list[str], tmp_path: Path
) -> None:
    steps = ["trainer.max_steps=2", "trainer.val_check_interval=2", "optimizer.learning_rate=1e-9"]
    train.main(["--config", str(CONTINUE), f"init_from={imported.path}", *small, *steps])
    run = RunDirectory(tmp_path / "continue")
    assert run.model_config() == imported.model_config()
    assert fingerprint(load_tokenizer(run.tokenizer_path)) == fingerprint(load_tokenizer(imported.tokenizer_path))
    assert (
        run.text_rule()
        == imported.text_rule()
        == {"separator": "<|endoftext|>", "before": ["<s>"], "after": ["<|endoftext|>"]}
    )
    before, after = load_file(imported.backbone_path), load_file(run.backbone_path)
    assert before.keys() == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}  # training starts in float32
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor.float(), rtol=0, atol=1e-6)
    train.train(resumed_config(run, None, ["trainer.max_steps=3"]), run)  # on the corpus with the same prefixes
    assert load_run_config(run).trainer.max_steps == 3


def test_what_the_config_states_is_kept(imported: RunDirectory) -> None:
    stated = ["model.max_sequence_length=64", "model.init_std=0.5", "data.sequence_length=64"]
    config = load_config(CONTINUE, [f"init_from={imported.path}", *stated])
    assert config.model == replace(imported.model_config(), max_sequence_length=64, init_std=0.5)
    assert config.data.tokenizer.path == str(imported.tokenizer_path)
    named = load_config(CONTINUE, [f"init_from={imported.path}", *stated, "data.tokenizer.hub=a/b"])
    assert (named.data.tokenizer.path, named.data.tokenizer.hub) == (None, "a/b")


def test_how_the_run_was_computed_is_not_taken_over(tmp_path: Path) -> None:
    model = replace(MODEL, gradient_checkpointing=True, expert_execution="per_token")
    RunDirectory(tmp_path).write_config({"model": model.to_dict()})
    stated = ["data.sequence_length=64", "data.tokenizer.vocab_size=300"]
    assert load_config(CONTINUE, [f"init_from={tmp_path}", *stated]).model == MODEL


def test_a_run_whose_config_is_older_gives_the_papers_block(tmp_path: Path) -> None:
    older = {"vocab_size": 300, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 48}
    RunDirectory(tmp_path).write_config({"model": older})
    model = load_config(CONTINUE, [f"init_from={tmp_path}", "data.tokenizer.vocab_size=300"]).model
    assert (model.activation, model.kv_heads, model.tie_embeddings) == ("gelu", 4, False)


def test_a_stated_key_that_differs_is_named(imported: RunDirectory, small: list[str]) -> None:
    config = load_config(CONTINUE, [f"init_from={imported.path}", *small, "model.qk_norm=false", "model.num_layers=1"])
    expected = r"holds another model \(model.num_layers 2 there, 1 here; model.qk_norm True there, False here\); set"
    with pytest.raises(RunError, match=expected):
        train.train(config)


def test_equal_numbers_of_heads_agree_however_they_are_stated(imported: RunDirectory, small: list[str]) -> None:
    config = load_config(CONTINUE, [f"init_from={imported.path}", *small, "model.head_dim=8"])
    with pytest.raises(RunError, match=r"\(model.head_dim 6 there, 8 here\)"):
        train.train(config)


def test_a_config_without_a_model_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.* is required; give it a value, or name a run with init_from$"):
        load_config(CONTINUE)
    with pytest.raises(RunError, match=r"^init_from: .*nowhere: no such run directory"):
        load_config(CONTINUE, [f"init_from={tmp_path / 'nowhere'}"])
    (tmp_path / "config.yaml").write_text("schema_version: 9\n")
    with pytest.raises(RunError, match=r"^init_from: .*config.yaml: schema_version 9, but this version reads 1"):
        load_config(CONTINUE, [f"init_from={tmp_path}"])


def test_the_ready_plug_in_of_an_imported_model(imported: RunDirectory, small: list[str], tmp_path: Path) -> None:
    steps = ["trainer.max_steps=4", "trainer.val_check_interval=4", "lut.dtype=float32"]
    train.main(["--config", str(CONFIGS / "plugin" / "plugin.yaml"), f"init_from={imported.path}", *small, *steps])
    run, ids = RunDirectory(tmp_path / "plugin"), torch.arange(24).unsqueeze(0)
    model, optimizer = run.model_config(), load_run_config(run).optimizer
    assert (model.num_experts, model.null_expert, model.mixture_layers) == (2, True, (0,))
    assert (model.expert_intermediate_size, optimizer.learning_rate, optimizer.weight_decay) == (32, 1e-3, 0)
    assert run.plug_in() is not None
    with load_model(imported.path) as base:
        alone = base(ids)
        base.attach(run)
        assert alone.dtype == torch.bfloat16
        attached = base(ids)
        assert not torch.equal(attached, alone)
        base.detach()
        assert torch.equal(base(ids), alone)
    with load_model(run, experts="ffn") as computed:
        torch.testing.assert_close(computed(ids), attached, rtol=0, atol=0.05)
