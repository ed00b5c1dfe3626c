"""Small models of every architecture, with random norm weights: all ones would hide a norm in the wrong place."""

from dataclasses import replace
from typing import Any

import torch

from src.model import ModelConfig, Transformer
from src.model.config import RopeScaling

DENSE = ModelConfig(
    vocab_size=13, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=12, max_sequence_length=32, init_std=0.3
)
MOLE = replace(DENSE, num_experts=3, expert_intermediate_size=10)
MOE = replace(MOLE, num_experts=4, intermediate_size=0, expert_input="hidden", top_k=2)

_LLAMA = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "activation": "swiglu", "rope_theta": 50.0}
_STRETCHED = RopeScaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=3.0, original_max_position_embeddings=16)
BLOCKS: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA, "rope_scaling": _STRETCHED},
    "smollm": {**_LLAMA, "head_dim": None, "num_kv_heads": 1, "tie_embeddings": True},
    "qwen2": {**_LLAMA, "attention_bias": True, "tie_embeddings": True},
    "qwen3": {**_LLAMA, "qk_norm": True},
    "everything": {
        **_LLAMA,
        "rope_scaling": _STRETCHED,
        "attention_bias": True,
        "qk_norm": True,
        "tie_embeddings": True,
    },
}
"""Settings in which other blocks differ from the paper's, one group of query heads per key head and more."""

CONFIGS: dict[str, ModelConfig] = {
    "dense": DENSE,
    "moe": MOE,
    "moe-top1": replace(MOE, top_k=1),
    "moe-full": replace(MOE, top_k=None),
    "moe-shared": replace(MOE, intermediate_size=12),
    "moe-full-shared": replace(MOE, top_k=None, intermediate_size=12),
    "mole": MOLE,
    "mole-per-token": replace(MOLE, expert_execution="per_token"),
    "mole-no-shared": replace(MOLE, intermediate_size=0),
    "mole-top2": replace(MOLE, top_k=2),
    "mole-permuted": replace(MOLE, expert_permutation=3),
    "mole-shared-row": replace(MOLE, shared_expert_row=True),
    "mole-null": replace(MOLE, null_expert=True),
    "mole-some-layers": replace(MOLE, num_layers=3, expert_layers=[0, 2], null_expert=True, **BLOCKS["smollm"]),
    "mole-last-layer": replace(MOLE, expert_layers=[1], expert_execution="per_token"),
    "mole-seen": replace(MOLE, expert_ids="seen"),
    "mole-seen-per-token": replace(MOLE, expert_ids="seen", expert_execution="per_token"),
    **{
        f"{name}-{block}": replace(config, **settings)
        for name, config in (("dense", DENSE), ("moe", MOE), ("mole", MOLE))
        for block, settings in BLOCKS.items()
    },
    "moe-full-everything": replace(MOE, top_k=None, **BLOCKS["everything"]),
    "mole-per-token-everything": replace(MOLE, expert_execution="per_token", **BLOCKS["everything"]),
}
ARCHITECTURES = ["dense", "moe", "moe-full", "mole", "dense-llama", "mole-everything"]


def build(config: ModelConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> Transformer:
    """Return a model whose weights are all random."""
    torch.manual_seed(seed)
    model = Transformer(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
    if model.has_row is not None:
        model.has_row[::2] = True
    return model


def token_ids(config: ModelConfig, batch_size: int = 2, length: int = 7, seed: int = 0) -> torch.Tensor:
    """Return random ids (B, T); in so small a vocabulary some repeat."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch_size, length), generator=generator)
