"""The oracle: the three architectures in plain loops over batch, positions, heads and experts.

It shares no code with `src.model`: norm, rotary embedding, attention, GELU and routing are written out from the
paper, one vector at a time. It takes a state dict, is differentiable, and works in the weights' precision.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from src.model import ModelConfig

Weights = Mapping[str, Tensor]


def reference_logits(weights: Weights, config: ModelConfig, token_ids: Tensor) -> Tensor:
    """Return the logits (B, T, V) of `token_ids` (B, T)."""
    return torch.stack([_sequence_logits(weights, config, row) for row in token_ids.tolist()])


def _sequence_logits(weights: Weights, config: ModelConfig, ids: list[int]) -> Tensor:
    embeddings = [weights["embedding.weight"][token_id] for token_id in ids]
    read_by_experts = embeddings
    if config.expert_permutation is not None:
        generator = torch.Generator().manual_seed(config.expert_permutation)
        permutation = torch.randperm(config.vocab_size, generator=generator)
        read_by_experts = [weights["embedding.weight"][permutation[token_id]] for token_id in ids]
    stream = list(embeddings)
    for layer in range(config.num_layers):
        part = _Part(weights, f"blocks.{layer}.")
        stream = _add(stream, _attention(part, config, _norms(stream, part["attention_norm.weight"], config)))
        normed = _norms(stream, part["ffn_norm.weight"], config)
        for position, hidden in enumerate(normed):
            added = torch.zeros_like(hidden)
            if config.intermediate_size:
                added = added + _ffn(hidden, part["shared_expert.up.weight"].T, part["shared_expert.down.weight"].T)
            if config.num_experts:
                added = added + _routed(weights, part, config, layer, hidden, read_by_experts[position])
            stream[position] = stream[position] + added
    return torch.stack([weights["head.weight"] @ hidden for hidden in _norms(stream, weights["norm.weight"], config)])


class _Part:
    """The weights whose names begin with a prefix."""

    def __init__(self, weights: Weights, prefix: str) -> None:
        self.weights, self.prefix = weights, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[self.prefix + name]


def _routed(
    weights: Weights, part: _Part, config: ModelConfig, layer: int, hidden: Tensor, embedding: Tensor
) -> Tensor:
    """Mix the experts of one position."""
    if config.expert_input == "embedding":
        experts = _Part(weights, f"experts.{layer}.")
        inputs = _norm(embedding, experts["norm.weight"], config)
        up, down = experts["experts.up"], experts["experts.down"]
    else:
        inputs, up, down = hidden, part["hidden_experts.up"], part["hidden_experts.down"]
    logits = [part["router.weight"][expert] @ hidden for expert in range(config.num_experts)]
    chosen = sorted(range(config.num_experts), key=lambda expert: -logits[expert].item())
    chosen = chosen[: config.num_experts if config.top_k is None else config.top_k]
    total = sum((logits[expert].exp() for expert in chosen), torch.zeros_like(logits[0]))
    mixed = torch.zeros_like(hidden)
    for expert in chosen:
        mixed = mixed + logits[expert].exp() / total * _ffn(inputs, up[expert], down[expert])
    return mixed


def _attention(part: _Part, config: ModelConfig, normed: list[Tensor]) -> list[Tensor]:
    """Let every position look at itself and what came before, head by head."""
    size, width = config.hidden_size, config.hidden_size // config.num_heads
    projection = part["attention.qkv.weight"]
    attended: list[Tensor] = []
    queries, keys, values = ([projection[i * size : (i + 1) * size] @ hidden for hidden in normed] for i in range(3))
    for position in range(len(normed)):
        heads: list[Tensor] = []
        for head in range(config.num_heads):
            span = slice(head * width, (head + 1) * width)
            query = _rotate(queries[position][span], position, config)
            scores = [
                (query @ _rotate(keys[other][span], other, config) / math.sqrt(width)).exp()
                for other in range(position + 1)
            ]
            total = sum(scores, torch.zeros_like(scores[0]))
            looked_at = [score / total * values[other][span] for other, score in enumerate(scores)]
            heads.append(sum(looked_at, torch.zeros_like(looked_at[0])))
        attended.append(part["attention.out.weight"] @ torch.cat(heads))
    return attended


def _rotate(vector: Tensor, position: int, config: ModelConfig) -> Tensor:
    """Turn the pair (i, i + K/2) by position * theta^(-2i/K), for every i below K/2."""
    half = len(vector) // 2
    rotated: list[Tensor] = [vector[0]] * len(vector)
    for i in range(half):
        angle = position * config.rope_theta ** (-2 * i / len(vector))
        cosine, sine = math.cos(angle), math.sin(angle)
        rotated[i] = vector[i] * cosine - vector[i + half] * sine
        rotated[i + half] = vector[i + half] * cosine + vector[i] * sine
    return torch.stack(rotated)


def _ffn(inputs: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Two matrices, (D, F) and (F, D), with the exact GELU between them."""
    inner = inputs @ up
    return (inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))) @ down


def _norm(vector: Tensor, weight: Tensor, config: ModelConfig) -> Tensor:
    return vector / torch.sqrt((vector * vector).mean() + config.norm_eps) * weight


def _norms(vectors: list[Tensor], weight: Tensor, config: ModelConfig) -> list[Tensor]:
    return [_norm(vector, weight, config) for vector in vectors]


def _add(left: list[Tensor], right: list[Tensor]) -> list[Tensor]:
    return [a + b for a, b in zip(left, right, strict=True)]
