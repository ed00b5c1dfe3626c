"""The authors' names: which of their tensors make up which of ours, and their config.json as our ModelConfig.

Arithmetic on names, tensors and settings; no files. They have one projection per query, key and value, one linear layer
per expert (out, in), and one table for all layers. Ours fuses the first, stacks the second as (E, in, out), and keeps
the third apart as a table on disk.

Their config is a LlamaConfig with one more field, `num_experts`. It names neither the architecture nor the routed
experts' width nor how many are chosen: the first follows from the tensors' names, the second is `intermediate_size`,
and the third is asked for. Their code ignores `hidden_act`: it is always the exact GELU.

D hidden, F intermediate, E experts, L layers, V vocabulary.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from src.errors import CheckpointError, ConfigError
from src.model import ModelConfig, Transformer

TABLE_NAME = "model.moe_table.weight"
"""The re-parameterized form's table (V, L*E*D): in row v, expert j of layer l starts at (l*E + j)*D."""


@dataclass(frozen=True)
class Correspondence:
    """One of our tensors and the authors' tensors that hold the same numbers."""

    ours: str
    theirs: tuple[str, ...]
    rule: Literal["same", "concatenated", "stacked"] = "same"
    rows: tuple[int, ...] = ()
    """Of each part that is concatenated; empty where they have equally many."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        if self.rule == "concatenated":
            return torch.cat(list(parts))  # 3 x (D, D) -> (3*D, D)
        if self.rule == "stacked":
            return torch.stack([part.T for part in parts])  # E x (out, in) -> (E, in, out)
        return parts[0]

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Invert `join`, bit for bit."""
        if self.rule == "concatenated":
            rows = self.rows or (len(tensor) // len(self.theirs),) * len(self.theirs)
            return list(tensor.split(rows))  # (3*D, D) -> 3 x (D, D)
        if self.rule == "stacked":
            return [expert.T for expert in tensor.unbind(0)]  # (E, in, out) -> E x (out, in)
        return [tensor]


def correspondences(config: ModelConfig, *, with_experts: bool) -> list[Correspondence]:
    """Return the correspondences of a model; `with_experts=False` leaves out what a table replaces."""
    found = [
        Correspondence("embedding.weight", ("model.embed_tokens.weight",)),
        Correspondence("norm.weight", ("model.norm.weight",)),
        Correspondence("head.weight", ("lm_head.weight",)),
    ]
    for layer in range(config.num_layers):
        found += _backbone_layer(config, layer)
        if config.architecture == "moe":
            found += _experts(config, layer, f"blocks.{layer}.hidden_experts")
        if config.architecture == "mole" and with_experts:
            theirs = f"model.layers.{layer}.expert_layernorm.weight"
            found.append(Correspondence(f"experts.{layer}.norm.weight", (theirs,)))
            found += _experts(config, layer, f"experts.{layer}.experts")
    return found


def official_shapes(config: ModelConfig, *, with_table: bool) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor that the authors' code saves for this model."""
    with torch.device("meta"):
        weights = Transformer(config, with_experts=not with_table).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in to_official(weights, config).items()}
    if with_table:
        shapes[TABLE_NAME] = (config.vocab_size, config.num_layers * config.num_experts * config.hidden_size)
    return shapes


def to_official(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Rename, split and transpose a state dict of ours, with or without its experts; tensors may be views."""
    with_experts = any(name.startswith("experts.") for name in weights)
    return {
        name: tensor
        for entry in correspondences(config, with_experts=with_experts)
        for name, tensor in zip(entry.theirs, entry.split(weights[entry.ours]), strict=True)
    }


def _backbone_layer(config: ModelConfig, layer: int) -> list[Correspondence]:
    ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
    query_key_value = tuple(f"{theirs}self_attn.{part}_proj.weight" for part in "qkv")
    pairs = {
        "attention_norm.weight": "input_layernorm.weight",
        "attention.out.weight": "self_attn.o_proj.weight",
        "ffn_norm.weight": "post_attention_layernorm.weight",
    }
    if config.intermediate_size:
        pairs |= {"shared_expert.up.weight": "mlp.up_proj.weight", "shared_expert.down.weight": "mlp.down_proj.weight"}
    if config.num_experts:
        pairs["router.weight"] = "router.weight"
    return [
        Correspondence(f"{ours}attention.qkv.weight", query_key_value, "concatenated"),
        *(Correspondence(ours + mine, (theirs + name,)) for mine, name in pairs.items()),
    ]


def _experts(config: ModelConfig, layer: int, ours: str) -> list[Correspondence]:
    def of_all_experts(matrix: str) -> tuple[str, ...]:
        return tuple(f"model.layers.{layer}.experts.{j}.{matrix}_proj.weight" for j in range(config.num_experts))

    return [Correspondence(f"{ours}.{matrix}", of_all_experts(matrix), "stacked") for matrix in ("up", "down")]


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
PAPERS_BLOCK = (
    "activation",
    "num_kv_heads",
    "head_dim",
    "attention_bias",
    "qk_norm",
    "tie_embeddings",
    "rope_scaling",
    "expert_layers",
    "null_expert",
    "expert_ids",
    "expert_permutation",
    "shared_expert_row",
)
"""Settings of the model that their code has only with the values that are defaults here."""
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
    """Add routed experts as the tensors' names imply: MoLE norms the embedding or has a table, MoE does neither."""
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
    other = [
        each for each in fields(config) if each.name in PAPERS_BLOCK and getattr(config, each.name) != each.default
    ]
    reason = None
    if other:
        default = "null" if other[0].default is None else other[0].default
        reason = f"model.{other[0].name} is {getattr(config, other[0].name)}, but their code computes {default}"
    elif config.architecture == "moe" and shared:
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
