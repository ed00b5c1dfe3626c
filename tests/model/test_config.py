"""The text of each mistake in a model config."""

from dataclasses import replace
from typing import Any

import pytest

from src.errors import ConfigError
from src.model import ModelConfig
from src.model.config import RopeScaling
from tests.model.models import CONFIGS, DENSE, MOE, MOLE


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (DENSE, {"vocab_size": 0}, "model.vocab_size: 0, but it must be at least 1 and at most 2147483647"),
        (DENSE, {"num_layers": -2}, "model.num_layers: -2, but it must be at least 1 and at most 4096"),
        (DENSE, {"init_std": -0.1}, "model.init_std: -0.1, but it must be at least 0"),
        (DENSE, {"norm_eps": 0.0}, "model.norm_eps: 0.0, but it must be above 0"),
        (DENSE, {"rope_theta": -1.0}, "model.rope_theta: -1.0, but it must be above 0"),
        (
            DENSE,
            {"num_heads": 3},
            "model.num_heads: 3 heads do not divide model.hidden_size 8 into an even head dimension; "
            "change one of them",
        ),
        (
            DENSE,
            {"num_heads": 8},
            "model.num_heads: 8 heads do not divide model.hidden_size 8 into an even head dimension; "
            "change one of them",
        ),
        (
            MOLE,
            {"expert_intermediate_size": 0},
            "model.expert_intermediate_size: 0, but model.num_experts is above 0; give each expert a width",
        ),
        (
            DENSE,
            {"intermediate_size": 0},
            "model.intermediate_size: 0 and no experts leave blocks without an FFN; set one of them",
        ),
        (DENSE, {"num_kv_heads": 0}, "model.num_kv_heads: 0, but it must be at least 1 and at most 1048576"),
        (
            DENSE,
            {"num_kv_heads": 4},
            "model.num_kv_heads: 4 heads of keys and values do not divide model.num_heads 2; change one of them",
        ),
        (DENSE, {"head_dim": 5}, "model.head_dim: 5, but the rotary embedding needs an even number"),
        (MOE, {"top_k": 5}, "model.top_k: 5, but it must be in 1..num_experts (4); null activates all"),
        (MOE, {"top_k": 0}, "model.top_k: 0, but it must be in 1..num_experts (4); null activates all"),
        (DENSE, {"top_k": 1}, "model.top_k: 1, but it must be in 1..num_experts (0); null activates all"),
        (
            DENSE,
            {"expert_layers": [0]},
            "model.expert_layers: [0], but this dense model has no experts that read embeddings; set it to null",
        ),
        (
            MOE,
            {"null_expert": True},
            "model.null_expert: True, but this moe model has no experts that read embeddings; set it to false",
        ),
        (
            MOLE,
            {"null_expert": True, "top_k": 2},
            "model.null_expert: true, but model.top_k is 2; the null expert is one choice more among all experts, so "
            "set model.top_k to null",
        ),
        (
            MOLE,
            {"expert_layers": [1, 0]},
            "model.expert_layers: [1, 0], but it must be layers in 0..1, in ascending order, such as [0, 2], or auto, "
            "or null for all of them",
        ),
        (
            MOLE,
            {"expert_layers": [1], "intermediate_size": 0},
            "model.intermediate_size: 0 and no experts leave blocks without an FFN; set one of them",
        ),
    ],
)
def test_mistakes(config: ModelConfig, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        replace(config, **change)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"factor": 0.5}, "model.rope_scaling.factor: 0.5, but it must be at least 1"),
        ({"high_freq_factor": 0.0}, "model.rope_scaling.high_freq_factor: 0.0, but it must be above 0"),
        (
            {"low_freq_factor": 4.0},
            "model.rope_scaling.low_freq_factor: 4, but it must be below model.rope_scaling.high_freq_factor (4)",
        ),
    ],
)
def test_mistakes_in_rope_scaling(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        replace(RopeScaling(), **values)  # type: ignore[arg-type]
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("num_layers", "expected"), [(1, (0,)), (2, (0,)), (3, (0,)), (4, (0, 2)), (30, tuple(range(0, 20, 2)))]
)
def test_auto_is_every_second_of_the_first_two_thirds(num_layers: int, expected: tuple[int, ...]) -> None:
    config = replace(MOLE, num_layers=num_layers, expert_layers=["auto"])
    assert config.mixture_layers == expected
    assert ModelConfig.from_dict(config.to_dict(), "") == config
    assert {config: 1}[replace(MOLE, num_layers=num_layers, expert_layers=list(expected))] == 1


def test_all_layers_are_null() -> None:
    assert replace(MOLE, expert_layers=[0, 1]) == MOLE
    assert (MOLE.mixture_layers, MOE.mixture_layers, DENSE.mixture_layers) == ((0, 1), (0, 1), ())


def test_heads_need_not_divide_the_hidden_size_where_their_width_is_given() -> None:
    config = replace(DENSE, num_heads=3, head_dim=6)
    assert (config.attention_head_dim, config.kv_heads) == (6, 3)


def test_a_config_without_the_keys_of_other_blocks_is_the_papers() -> None:
    added = {"num_kv_heads", "head_dim", "activation", "tie_embeddings", "attention_bias", "qk_norm", "rope_scaling"}
    older = {name: value for name, value in DENSE.to_dict().items() if name not in added}
    assert len(older) == len(DENSE.to_dict()) - len(added)
    assert ModelConfig.from_dict(older, "here") == DENSE


def test_architecture_follows_from_the_experts() -> None:
    assert {name: config.architecture for name, config in CONFIGS.items()} == {
        name: name.partition("-")[0] for name in CONFIGS
    }


def test_unknown_and_missing_keys_name_their_file() -> None:
    with pytest.raises(ConfigError, match=r"run/config.yaml: unknown model key 'experts'; was it written by a newer"):
        ModelConfig.from_dict({**DENSE.to_dict(), "experts": 4}, "run/config.yaml")
    with pytest.raises(ConfigError, match=r"run/config.yaml: incomplete model config \(.*'vocab_size'\)"):
        ModelConfig.from_dict(
            {name: value for name, value in DENSE.to_dict().items() if name != "vocab_size"}, "run/config.yaml"
        )


def test_values_survive_a_round_trip() -> None:
    for config in CONFIGS.values():
        assert ModelConfig.from_dict(config.to_dict(), "here") == config
