"""The text of each mistake in a model config."""

from dataclasses import replace
from typing import Any

import pytest

from src.errors import ConfigError
from src.model import ModelConfig
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
        (MOE, {"top_k": 5}, "model.top_k: 5, but it must be in 1..num_experts (4); null activates all"),
        (MOE, {"top_k": 0}, "model.top_k: 0, but it must be in 1..num_experts (4); null activates all"),
        (DENSE, {"top_k": 1}, "model.top_k: 1, but it must be in 1..num_experts (0); null activates all"),
    ],
)
def test_mistakes(config: ModelConfig, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        replace(config, **change)
    assert str(caught.value) == message


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
