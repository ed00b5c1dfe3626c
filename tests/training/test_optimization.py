"""The learning rate at given steps, and which parameter gets which rate and decay."""

from dataclasses import replace

import pytest
import torch

from src.errors import ConfigError
from src.model import ModelConfig, Transformer
from src.model.transformer import parameter_part
from src.training.config import Multipliers, OptimizerConfig
from src.training.optimization import build_optimizer, build_schedule, learning_rate_factor

DENSE = ModelConfig(vocab_size=11, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=8)
MOLE = replace(DENSE, num_experts=3, expert_intermediate_size=8)
MOE = replace(MOLE, intermediate_size=0, expert_input="hidden", top_k=2)
BASE = OptimizerConfig(warmup_steps=10, min_learning_rate_ratio=0.1)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (BASE, {0: 0.1, 9: 1.0, 10: 1.0, 60: 0.55, 110: 0.1, 500: 0.1}),
        (replace(BASE, schedule="constant"), {0: 0.1, 9: 1.0, 10: 1.0, 60: 1.0, 110: 1.0}),
        (replace(BASE, schedule="wsd", decay_steps=20), {0: 0.1, 10: 1.0, 90: 1.0, 100: 0.55, 110: 0.1, 500: 0.1}),
        (replace(BASE, schedule="wsd"), {98: 1.0, 99: 1.0, 110: 0.1}),  # the last 11 of 110
        (replace(BASE, schedule="wsd", decay_steps=1000), {9: 1.0, 10: 1.0, 60: 0.55, 110: 0.1}),
        (replace(BASE, warmup_steps=0), {0: 1.0, 55: 0.55, 110: 0.1}),
    ],
    ids=["cosine", "constant", "wsd", "wsd-default-decay", "wsd-decay-longer-than-run", "no-warmup"],
)
def test_learning_rate_at_given_steps(config: OptimizerConfig, expected: dict[int, float]) -> None:
    found = {step: learning_rate_factor(step, config, total_steps=110) for step in expected}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("model", [DENSE, MOE, MOLE], ids=["dense", "moe", "mole"])
def test_every_parameter_is_in_exactly_one_group(model: ModelConfig) -> None:
    parameters = dict(Transformer(model).named_parameters())
    groups = build_optimizer(parameters.items(), BASE).param_groups
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in parameters.values())


def test_biases_and_head_norms_do_not_decay_and_a_tied_matrix_is_updated_once() -> None:
    model = Transformer(replace(DENSE, attention_bias=True, qk_norm=True, tie_embeddings=True))
    groups = {
        id(parameter): group["name"]
        for group in build_optimizer(model.named_parameters(), BASE).param_groups
        for parameter in group["params"]
    }
    by_name = {name: groups.pop(id(parameter)) for name, parameter in model.named_parameters()}
    assert not groups
    assert by_name["embedding.weight"] == "embedding"
    small = [name for name in by_name if name.endswith(("qkv.bias", "query_norm.weight", "key_norm.weight"))]
    assert {by_name[name] for name in small} == {"backbone_norms"}
    assert len(small) == 3 * DENSE.num_layers


@pytest.mark.parametrize("model", [DENSE, MOE, MOLE], ids=["dense", "moe", "mole"])
def test_multipliers_reach_their_part_and_one_dimension_never_decays(model: ModelConfig) -> None:
    config = OptimizerConfig(
        learning_rate=1.0,
        weight_decay=0.5,
        embedding_multipliers=Multipliers(learning_rate=2.0, weight_decay=0.0),
        expert_multipliers=Multipliers(learning_rate=3.0, weight_decay=4.0),
    )
    parameters = dict(Transformer(model).named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    assert (model is DENSE) == all(parameter_part(name) != "experts" for name in parameters)
    for group in build_optimizer(parameters.items(), config).param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            rate, decay = (1.0, 0.5)
            if name == "embedding.weight":
                rate, decay = 2.0, 0.0
            elif name.startswith("experts.") or ".hidden_experts." in name:
                rate, decay = 3.0, 2.0
            assert (group["lr"], group["weight_decay"]) == (rate, decay if parameter.dim() > 1 else 0.0), name


def test_the_schedule_scales_every_group_by_the_same_factor() -> None:
    config = replace(BASE, learning_rate=1.0, expert_multipliers=Multipliers(learning_rate=3.0))
    optimizer = build_optimizer(Transformer(MOLE).named_parameters(), config)
    schedule = build_schedule(optimizer, config, total_steps=110)
    for _ in range(60):
        optimizer.step()
        schedule.step()
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx(
        {"backbone": 0.55, "backbone_norms": 0.55, "embedding": 0.55, "experts": 1.65, "experts_norms": 1.65}
    )


def test_a_learning_rate_multiplier_of_zero_freezes_its_part() -> None:
    config = OptimizerConfig(warmup_steps=0, expert_multipliers=Multipliers(learning_rate=0.0))
    model = Transformer(MOLE)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model.named_parameters(), config)
    model(torch.arange(6).view(1, 6)).square().sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("experts."), name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"decay_steps": 10}, "the cosine schedule has no final decay"),
        ({"schedule": "wsd", "decay_steps": 0}, "optimizer.decay_steps: 0, but it must be at least 1"),
        (
            {"expert_multipliers": Multipliers(learning_rate=-1.0)},
            r"optimizer.expert_multipliers.learning_rate: -1.0, but it must be at least 0",
        ),
        (
            {"embedding_multipliers": Multipliers(weight_decay=-1.0)},
            r"optimizer.embedding_multipliers.weight_decay: -1.0, but it must be at least 0",
        ),
    ],
)
def test_values_out_of_range_name_their_key(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**values)  # pyright: ignore[reportArgumentType]
