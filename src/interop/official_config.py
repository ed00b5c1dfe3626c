"""The authors' config.json and our ModelConfig, both ways.

Theirs is a LlamaConfig with one more field, `num_experts`. It names neither the architecture nor the routed
experts' width nor how many are chosen: the first follows from the tensors' names, the second is
`intermediate_size`, and the third is asked for. Their code ignores `hidden_act`: it is always the exact GELU.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch

from src.errors import CheckpointError, ConfigError
from src.interop.names import TABLE_NAME
from src.model import ModelConfig

SUPPORTED = {
    "model_type": "llama",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "rope_scaling": None,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
"""Fields that would change what is computed, each with the one value that this model computes."""
CLASS_NAMES = {"dense": "DenseForCausalLM", "moe": "MoeForCausalLM", "mole": "MoleForCausalLM"}


def read_model_config(
    values: Mapping[str, object], tensor_names: Collection[str], top_k: int, where: str
) -> ModelConfig:
    """Read the shape of a model from config.json and the names of its tensors.

    `top_k` is used by MoE alone. Raises CheckpointError, naming `where` and the field, for what has no counterpart.
    """
    _require_supported(values, where)
    hidden_size, num_heads = _integer(values, "hidden_size", where), _integer(values, "num_attention_heads", where)
    for name, expected in (("num_key_value_heads", num_heads), ("head_dim", hidden_size // max(num_heads, 1))):
        if values.get(name) not in (None, expected):
            raise CheckpointError(f"{where}: {name} is {values[name]!r}, but only {expected} is supported here")
    try:
        dense = ModelConfig(
            vocab_size=_integer(values, "vocab_size", where),
            hidden_size=hidden_size,
            num_layers=_integer(values, "num_hidden_layers", where),
            num_heads=num_heads,
            intermediate_size=_integer(values, "intermediate_size", where),
            max_sequence_length=_integer(values, "max_position_embeddings", where, default=2048),
            rope_theta=_number({**values, **_rope_parameters(values, where)}, "rope_theta", where, default=10000.0),
            norm_eps=_number(values, "rms_norm_eps", where, default=1e-6),
            init_std=_number(values, "initializer_range", where, default=0.02),
        )
        return _with_experts(dense, values, tensor_names, top_k, where)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error


def official_config(config: ModelConfig, dtype: torch.dtype, end_of_text: int | None) -> dict[str, object]:
    """Return config.json for the authors' code; raises CheckpointError for a model that it cannot express.

    `num_experts_per_tok` is not one of theirs: their code ignores it, and importing checks it against `--top-k`.
    """
    require_expressible(config)
    values: dict[str, object] = {
        "architectures": [CLASS_NAMES[config.architecture]],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size or config.expert_intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads,
        "max_position_embeddings": config.max_sequence_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "hidden_act": "gelu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "initializer_range": config.init_std,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if config.num_experts:
        values["num_experts"] = config.num_experts
    if config.architecture == "moe":
        values["num_experts_per_tok"] = config.active_experts
    return values


def _with_experts(
    config: ModelConfig, values: Mapping[str, object], tensor_names: Collection[str], top_k: int, where: str
) -> ModelConfig:
    """Add routed experts as the tensors' names tell them: MoLE norms the embedding or has a table, MoE does neither."""
    num_experts = _integer(values, "num_experts", where, default=0)
    is_mole = TABLE_NAME in tensor_names or any(".expert_layernorm." in name for name in tensor_names)
    is_moe = not is_mole and any(".experts." in name for name in tensor_names)
    if bool(num_experts) != (is_mole or is_moe):
        found = "experts" if is_mole or is_moe else "no experts"
        raise CheckpointError(
            f"{where}: num_experts is {num_experts}, but the weights hold {found}; they are of two models"
        )
    if is_mole:
        return replace(config, num_experts=num_experts, expert_intermediate_size=config.intermediate_size)
    if is_moe:
        if (recorded := values.get("num_experts_per_tok", top_k)) != top_k:
            raise CheckpointError(f"{where}: num_experts_per_tok is {recorded!r}, but top_k is {top_k}; pass --top-k")
        return replace(
            config,
            intermediate_size=0,
            num_experts=num_experts,
            expert_intermediate_size=config.intermediate_size,
            expert_input="hidden",
            top_k=top_k,
        )
    return config


def _require_supported(values: Mapping[str, object], where: str) -> None:
    for name, expected in SUPPORTED.items():
        if values.get(name, expected) != expected:
            raise CheckpointError(f"{where}: {name} is {values[name]!r}, but only {expected!r} is supported here")


def _rope_parameters(values: Mapping[str, object], where: str) -> Mapping[str, object]:
    """Return the section that newer versions of transformers write instead of `rope_theta` and `rope_scaling`."""
    section = values.get("rope_parameters") or {}
    if not isinstance(section, Mapping) or section.get("rope_type", "default") != "default":
        raise CheckpointError(f"{where}: rope_parameters is {section!r}, but only rope_type 'default' is supported")
    return section


def require_expressible(config: ModelConfig) -> None:
    """Raise CheckpointError naming the setting that the authors' code has no field for."""
    shared, routed = config.intermediate_size, config.expert_intermediate_size
    reason = None
    if config.architecture == "moe" and shared:
        reason = f"model.intermediate_size is {shared}, but their MoE has no shared expert"
    elif config.architecture == "mole" and not shared:
        reason = "model.intermediate_size is 0, but their MoLE always has a shared expert"
    elif config.architecture == "mole" and shared != routed:
        reason = f"model.expert_intermediate_size is {routed}, but theirs equals model.intermediate_size ({shared})"
    elif config.architecture == "mole" and config.top_k is not None:
        reason = f"model.top_k is {config.top_k}, but their MoLE mixes all experts"
    if reason is not None:
        raise CheckpointError(f"the authors' code cannot express this model: {reason}; keep it as a run")


def _integer(values: Mapping[str, object], name: str, where: str, default: int | None = None) -> int:
    found = values.get(name, default)
    if not isinstance(found, int) or isinstance(found, bool):
        raise CheckpointError(f"{where}: {name} is {found!r}, but it must be an integer")
    return found


def _number(values: Mapping[str, object], name: str, where: str, default: float) -> float:
    found = values.get(name, default)
    if not isinstance(found, int | float) or isinstance(found, bool):
        raise CheckpointError(f"{where}: {name} is {found!r}, but it must be a number")
    return float(found)
