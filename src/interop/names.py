"""Which of the authors' tensors make up which of ours, and back. Arithmetic on names and tensors; no files.

Theirs are one projection per query, key and value, one linear layer per expert (out, in), and one table for all
layers. Ours fuse the first, stack the second as (E, in, out), and keep the third apart as a table on disk.

D hidden, F intermediate, E experts, L layers, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from src.model import ModelConfig, Transformer

TABLE_NAME = "model.moe_table.weight"
"""The re-parameterised form's table (V, L*E*D): in row v, expert j of layer l starts at (l*E + j)*D."""


@dataclass(frozen=True)
class Correspondence:
    """One tensor of ours and the authors' tensors that hold the same numbers."""

    ours: str
    theirs: tuple[str, ...]
    rule: Literal["same", "concatenated", "stacked"] = "same"

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Make our tensor from theirs."""
        if self.rule == "concatenated":
            return torch.cat(list(parts))  # 3 x (D, D) -> (3*D, D)
        if self.rule == "stacked":
            return torch.stack([part.T for part in parts])  # E x (out, in) -> (E, in, out)
        return parts[0]

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Make their tensors from ours; the inverse of `join`, bit for bit."""
        if self.rule == "concatenated":
            return list(tensor.chunk(len(self.theirs)))  # (3*D, D) -> 3 x (D, D)
        if self.rule == "stacked":
            return [expert.T for expert in tensor.unbind(0)]  # (E, in, out) -> E x (out, in)
        return [tensor]


def correspondences(config: ModelConfig, *, with_experts: bool) -> list[Correspondence]:
    """Return how each tensor of a model is made; `with_experts=False` leaves out what a table replaces."""
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
