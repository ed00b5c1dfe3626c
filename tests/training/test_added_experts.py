"""Experts added to a trained model: the same function at first, and nothing computed for weights that are frozen."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor, nn

from src.data.tokenizer import load_tokenizer
from src.errors import ConfigError, RunError
from src.inference import generate, load_model
from src.model import ModelConfig, Transformer
from src.model.loss import next_token_loss
from src.model.transformer import Block, parameter_part
from src.run_directory import PlugIn, RunDirectory, added_weights
from src.train import RunResult, resumed_config, train
from src.training.checkpoints import read_weights
from src.training.config import Multipliers, OptimizerConfig
from src.training.optimization import build_optimizer, freeze
from src.training.resume import start_from_run
from tests.conftest import PLUG_IN, small_config
from tests.model.models import CONFIGS, DENSE, MOLE, build, token_ids

ADDED = {"num_experts": 2, "expert_intermediate_size": 6, "null_expert": True}
FROZEN = OptimizerConfig(backbone_multipliers=Multipliers(learning_rate=0.0))
BASES = {
    "dense": replace(DENSE, num_layers=4),
    "grouped": replace(CONFIGS["dense-llama"], num_layers=4),
    "tied": replace(CONFIGS["dense-smollm"], num_layers=4),
    "mole": replace(MOLE, num_layers=4, expert_layers=[1, 3]),
}


def write_base(path: Path, config: ModelConfig, dtype: torch.dtype = torch.float32) -> RunDirectory:
    run = RunDirectory(path)
    path.mkdir()
    run.write_config({"name": path.name, "model": config.to_dict(), "trainer": {"max_steps": 1}})
    run.write_weights(build(config, dtype).state_dict())
    return run


def with_experts(config: ModelConfig) -> ModelConfig:
    if config.num_experts:
        return replace(config, expert_layers=[0, 1, 3])
    return replace(config, expert_layers=["auto"], **ADDED)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BASES)
@torch.no_grad()
def test_at_first_the_function_is_that_of_the_run(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = BASES[name]
    run = write_base(tmp_path / "base", config, dtype)
    model = Transformer(with_experts(config)).eval()
    start_from_run(model, run, Tokenizer(BPE()))
    with load_model(run.path, experts="ffn", dtype=torch.float32) as base:
        ids = token_ids(config)
        assert torch.equal(model(ids), base(ids))
        assert torch.equal(generate(model, ids, max_new_tokens=9), generate(base, ids, max_new_tokens=9))
    assert all(parameter.requires_grad for parameter in model.parameters())
    ids = token_ids(config, length=8)
    with torch.enable_grad():
        next_token_loss(model.hidden_states(ids[:, :-1]), model.head, ids[:, 1:]).backward()
    down = model.get_parameter("experts.0.experts.down")
    assert down.grad is not None and down.grad.abs().max() > 0  # so that they learn


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"expert_layers": [0, 1]}, r"model.expert_layers \[1, 3\] there, \[0, 1\] here"),
        ({"expert_layers": None, "num_experts": 4}, "model.num_experts 3 there, 4 here"),
        ({"expert_layers": None, "null_expert": True}, "model.null_expert False there, True here"),
    ],
)
def test_what_is_no_addition_is_refused(change: dict[str, object], named: str, tmp_path: Path) -> None:
    run = write_base(tmp_path / "base", BASES["mole"])
    with pytest.raises(RunError, match=f"init_from: .*holds another model \\({named}\\)"):
        start_from_run(Transformer(replace(BASES["mole"], **change)), run, Tokenizer(BPE()))  # type: ignore[arg-type]


def saved_tensors(model: Transformer, ids: Tensor) -> tuple[list[Tensor], dict[int, int]]:
    """Return what a forward pass keeps for the backward pass, and how many of them when each block is done."""
    saved, at_block = list[Tensor](), dict[int, int]()

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    def done(block: nn.Module, *_: object) -> None:
        at_block.setdefault(list(model.blocks).index(block), len(saved))

    for block in model.blocks:
        block.register_forward_hook(done)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        next_token_loss(model.hidden_states(ids[:, :-1]), model.head, ids[:, 1:]).backward()
    return saved, at_block


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", ["dense", "grouped", "tied"])
def test_nothing_is_kept_for_frozen_weights(name: str, checkpointing: bool) -> None:
    config = replace(with_experts(BASES[name]), expert_layers=[2], gradient_checkpointing=checkpointing)
    model = build(config, torch.float32)
    freeze(model.named_parameters(), FROZEN)
    inputs = list[Tensor]()
    for block in model.blocks:
        assert isinstance(block, Block) and block.shared_expert is not None
        block.shared_expert.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        block.attention.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    saved, at_block = saved_tensors(model, token_ids(config, length=9))
    assert (at_block[0], at_block[1]) == (0, 0)  # below the first layer with experts
    by_frozen = {each.data_ptr() for each in inputs[6:8]}  # of the last layer, which has no router
    assert len(inputs) == (12 if checkpointing else 8)
    assert by_frozen.isdisjoint({each.data_ptr() for each in saved})
    trained = {parameter for parameter in model.parameters() if parameter.grad is not None}
    assert trained == {each for each in model.parameters() if each.requires_grad}
    parts = {parameter_part(at) for at, each in model.named_parameters() if each.requires_grad}
    assert parts == {"experts", "routers"}
    optimizer = build_optimizer(model.named_parameters(), FROZEN)
    optimizer.step()
    assert optimizer.state.keys() == trained
    assert {group["name"] for group in optimizer.param_groups} == {"experts", "experts_norms", "routers"}


def test_a_small_rate_trains_the_backbone_too() -> None:
    config = replace(FROZEN, backbone_multipliers=Multipliers(learning_rate=0.25, weight_decay=0.5))
    config = replace(config, embedding_multipliers=Multipliers(learning_rate=0.5), learning_rate=1.0, weight_decay=1.0)
    model = Transformer(with_experts(BASES["dense"]))
    freeze(model.named_parameters(), config)
    groups = build_optimizer(model.named_parameters(), config).param_groups
    found = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert found == {
        "embedding": (0.125, 0.5),
        "backbone": (0.25, 0.5),
        "backbone_norms": (0.25, 0.0),
        "routers": (1.0, 1.0),
        "experts": (1.0, 1.0),
        "experts_norms": (1.0, 0.0),
    }


def test_training_changes_experts_and_routers_alone(dense_run: RunDirectory, plug_in_run: RunResult) -> None:
    with load_model(dense_run.path) as before, load_model(plug_in_run.run_dir, experts="ffn") as after:
        assert (after.config.mixture_layers, after.config.router_choices) == ((0,), 3)
        theirs, ours = before.state_dict(), after.state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert {parameter_part(name) for name in ours.keys() - theirs.keys()} == {"experts", "routers"}
    report = plug_in_run.report
    assert report is not None and report.initial is not None and report.lookup_form is not None
    assert report.training_form.loss < report.initial.loss - 0.01
    assert report.difference == pytest.approx(0, abs=1e-5)
    assert report.table is not None and report.table.bytes_per_token == 1 * 2 * 64 * 4


def test_nothing_of_the_base_is_stored(dense_run: RunDirectory, plug_in_run: RunResult) -> None:
    run = RunDirectory(plug_in_run.run_dir)
    assert load_file(run.backbone_path).keys() == {"blocks.0.router.weight"}
    weights = read_weights(run.checkpoints_path / "last.ckpt")
    assert (
        weights.keys() == added_weights(weights).keys() == {*load_file(run.backbone_path), *load_file(run.experts_path)}
    )
    assert run.identity() == run.identify(weights)
    assert run.plug_in() == PlugIn(str(dense_run.path), dense_run.identity().backbone)
    assert run.config_values()["init_from"] == str(dense_run.path)


def test_resuming_gives_the_same_weights(
    plug_in_run: RunResult, small_overrides: Sequence[str], tmp_path: Path
) -> None:
    run = RunDirectory(plug_in_run.run_dir)
    values = run.config_values()
    more = ("trainer.max_steps=6", "evaluation.at_fit_end=false", "evaluation.dashboard=false")
    config = small_config(small_overrides, tmp_path, f"init_from={values['init_from']}", *PLUG_IN, *more)
    resumed = RunDirectory(train(config).run_dir)
    train(resumed_config(resumed, None, ["trainer.max_steps=12"]), resumed)
    for path in ("experts.safetensors", "backbone.safetensors"):
        found, expected = load_file(resumed.path / path), load_file(run.path / path)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found), path


@pytest.mark.slow
def test_a_plug_in_is_trained_on_as_one_or_becomes_a_whole_model(
    dense_run: RunDirectory, plug_in_run: RunResult, small_overrides: Sequence[str], tmp_path: Path
) -> None:
    more = (f"init_from={plug_in_run.run_dir}", *PLUG_IN, "trainer.max_steps=2", "evaluation.at_fit_end=false")
    again = RunDirectory(train(small_config(small_overrides, tmp_path, *more, "name=again")).run_dir)
    assert again.plug_in() == PlugIn(str(dense_run.path), dense_run.identity().backbone)
    everything = "optimizer.backbone_multipliers.learning_rate=0.1"
    whole = RunDirectory(train(small_config(small_overrides, tmp_path, *more, everything, "name=whole")).run_dir)
    assert whole.plug_in() is None
    before, after = load_file(dense_run.backbone_path), load_file(whole.backbone_path)
    assert not torch.equal(before["head.weight"], after["head.weight"])


@pytest.mark.slow
def test_averaged_weights_of_a_plug_in(dense_run: RunDirectory, small_overrides: Sequence[str], tmp_path: Path) -> None:
    more = (*PLUG_IN, "evaluation.at_fit_end=false", "checkpoint.ema_decay=0.5", "checkpoint.final_weights=best")
    config = small_config(small_overrides, tmp_path, f"init_from={dense_run.path}", *more, "trainer.max_steps=4")
    run = RunDirectory(train(config).run_dir)
    train(resumed_config(run, None, ["trainer.max_steps=6"]), run)
    weights = read_weights(run.checkpoints_path / "last.ckpt")
    assert weights.keys() == added_weights(weights).keys()


def test_what_cannot_be_frozen_is_refused(small_overrides: Sequence[str], tmp_path: Path) -> None:
    frozen = "optimizer.backbone_multipliers.learning_rate=0"
    with pytest.raises(ConfigError, match="0, but a dense model has no experts that could be trained instead"):
        small_config(small_overrides, tmp_path, "model.num_experts=0", frozen)
    with pytest.raises(ConfigError, match=r"learning_rate: 0 is not possible with trainer.strategy fsdp2; use ddp"):
        small_config(small_overrides, tmp_path, frozen, "trainer.strategy=fsdp2")


def test_the_tokenizer_is_taken_over(dense_run: RunDirectory, plug_in_run: RunResult) -> None:
    theirs, ours = (load_tokenizer(path / "tokenizer.json").to_str() for path in (dense_run.path, plug_in_run.run_dir))
    assert theirs == ours
