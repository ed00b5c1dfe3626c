"""Floating-point operations per token, by component: two per multiply-add, in matrix products and the mixture alone.

A micro-batches, B batch, T tokens, D hidden, F intermediate, E experts, K experts mixed per token, L layers,
V vocabulary, U unique ids.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import torch
from torch import Tensor

from src.model import ModelConfig, Transformer
from src.model.transformer import parameter_part

HEAPS_SCALE, HEAPS_EXPONENT = 5.963, 0.6494
"""Fitted to 3,150 distinct ids in 16,384 tokens and 11,108 in 131,072, prose in the GPT-NeoX vocabulary of 50,304."""


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Operations per token over all layers."""

    attention_projections: float
    """Query, key, value and output; where each is (D, D), 8 D^2 a layer."""
    attention_scores: float
    """Scores and weighted values of H heads of width K, over the mean causal context of a window, (T + 1) / 2:
    4 H K (T + 1) / 2 a layer."""
    always_on_ffn: float
    """Dense's FFN or the shared expert: 4 D F a layer, with SwiGLU 6 D F."""
    routed_experts: float
    """4 D F_expert, with SwiGLU 6, for each expert that runs; 0 where rows are looked up."""
    router: float
    """2 D E a layer that has experts; one more than E with a null expert."""
    mixture: float
    """The weighted sum of K rows: 2 D K a layer that has experts."""
    vocabulary_head: float
    """2 D V."""

    @property
    def total(self) -> float:
        return sum(getattr(self, item.name) for item in fields(self))


@lru_cache(maxsize=8)
def meta_model(model: ModelConfig) -> Transformer:
    """Return the model on the meta device, with shapes and no storage; for counting, not for changing."""
    with torch.device("meta"):
        return Transformer(model)


@lru_cache(maxsize=64)
def _matrix_values(model: ModelConfig) -> Counter[str]:
    """Return the number of values in the matrices of all layers, by the part of a block that they belong to."""
    values = Counter[str]()
    for name, parameter in meta_model(model).named_parameters():
        if parameter.dim() > 1:
            part = name.split(".")[2] if name.startswith("blocks.") else name
            values["experts" if parameter_part(name) == "experts" else part] += parameter.numel()
    return values


def forward_flops(model: ModelConfig, sequence_length: int) -> Flops:
    """Return one forward pass of the training form, with MoLE's experts at every position as in the paper."""
    layers, hidden, values = model.num_layers, model.hidden_size, _matrix_values(model)
    return Flops(
        attention_projections=2 * values["attention"],
        attention_scores=layers * 4 * model.num_heads * model.attention_head_dim * (sequence_length + 1) / 2,
        always_on_ffn=2 * values["shared_expert"],
        routed_experts=2 * values["experts"] * computed_experts(model) // max(1, model.num_experts),
        router=2 * values["router"],
        mixture=len(model.mixture_layers) * 2 * hidden * model.active_experts,
        vocabulary_head=2 * hidden * model.vocab_size,
    )


def computed_experts(model: ModelConfig) -> int:
    """Return the experts that run per position: MoE's chosen ones, all of MoLE's, whose rows need every expert."""
    return model.num_experts if model.architecture == "mole" else model.active_experts


def training_flops(forward: Flops, model: ModelConfig, *, trains_backbone: bool = True) -> Flops:
    """Return forward and backward pass; the backward pass costs twice the forward pass.

    Checkpointing repeats at most the forward pass without the head: torch stops at the last activation it needs.
    A backbone that is not trained gets no gradient of its matrices, and none at all up to the first layer with experts.
    """
    passes = 4 if model.gradient_checkpointing else 3
    scaled = {item.name: passes * getattr(forward, item.name) for item in fields(forward)}
    scaled["vocabulary_head"] = 3 * forward.vocabulary_head
    if not trains_backbone:
        first, layers = model.mixture_layers[0], model.num_layers
        repeated, crossed = (passes - 3) * (layers - first) / layers, (layers - first - 1) / layers
        for name in ("attention_projections", "always_on_ffn"):
            scaled[name] = (1 + repeated + crossed) * getattr(forward, name)
        scaled["attention_scores"] = (1 + repeated + 2 * crossed) * forward.attention_scores
        scaled["vocabulary_head"] = 2 * forward.vocabulary_head
    return Flops(**scaled)


def once_per_unique_id(flops: Flops, unique_ids: int, micro_batch_tokens: int) -> Flops:
    """Return the operations with experts run on the U distinct ids of a micro-batch instead of on each token."""
    return replace(flops, routed_experts=flops.routed_experts * unique_ids / micro_batch_tokens)


def lookup_flops(forward: Flops) -> Flops:
    """Return the operations of the lookup form: no expert runs."""
    return replace(forward, routed_experts=0.0)


def estimated_unique_ids(micro_batch_tokens: int, vocab_size: int) -> int:
    """Return the expected number of distinct ids: Heaps' law, flattening toward the size of the vocabulary."""
    unlimited = HEAPS_SCALE * micro_batch_tokens**HEAPS_EXPONENT
    limited = vocab_size * -math.expm1(-unlimited / vocab_size)
    return max(1, min(micro_batch_tokens, vocab_size, round(limited)))


def step_flops(
    model: ModelConfig, shape: Sequence[int], computed_ids: int, *, head: bool = True, trains_backbone: bool = True
) -> float:
    """Return the operations of one training step on micro-batches of `shape` (A, B, T), with or without the `head`.

    `computed_ids` counts the ids that embedding experts run on, over all micro-batches.
    """
    forward = forward_flops(model, shape[-1])
    tokens, per_token = math.prod(shape), training_flops(forward, model, trains_backbone=trains_backbone)
    if model.architecture == "mole":
        per_token = once_per_unique_id(per_token, computed_ids, tokens)
    return tokens * (per_token.total - (0 if head else per_token.vocabulary_head))


def count_computed_ids(model: ModelConfig, token_ids: Tensor) -> int:
    """Return how many ids embedding experts run on in a step on micro-batches (A, B, T)."""
    if model.expert_execution == "per_token":
        return token_ids.numel()
    parts = [token_ids] if model.expert_execution == "unique_per_step" else list(token_ids)
    return sum(part.unique().numel() for part in parts)
