"""The oracle: the three architectures in plain loops over batch, positions, heads and experts.

It shares no code with `src.model`: norm, rotary embedding, attention, activations and routing are written out from the
papers, one vector at a time. It takes a state dict, is differentiable, and works in the weights' precision.
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
    if config.shared_expert_row:
        read_by_experts = [weights["embedding.weight"][0]] * len(ids)
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
                added = added + _ffn(hidden, _Matrices(part, "shared_expert.", ".weight", transposed=True), config)
            routed = config.num_experts and (config.expert_layers is None or layer in config.expert_layers)
            if routed and ("has_row" not in weights or weights["has_row"][ids[position]]):
                added = added + _routed(weights, part, config, layer, hidden, read_by_experts[position])
            stream[position] = stream[position] + added
    head = weights["embedding.weight" if config.tie_embeddings else "head.weight"]
    return torch.stack([head @ hidden for hidden in _norms(stream, weights["norm.weight"], config)])


class _Part:
    """The weights whose names begin with a prefix."""

    def __init__(self, weights: Weights, prefix: str) -> None:
        self.weights, self.prefix = weights, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[self.prefix + name]


class _Matrices:
    """The matrices of one FFN, (in, out)."""

    def __init__(
        self, part: _Part, prefix: str, suffix: str = "", *, expert: int | None = None, transposed: bool = False
    ) -> None:
        self.part, self.prefix, self.suffix = part, prefix, suffix
        self.expert, self.transposed = expert, transposed

    def __getitem__(self, name: str) -> Tensor:
        weight = self.part[self.prefix + name + self.suffix]
        weight = weight if self.expert is None else weight[self.expert]
        return weight.T if self.transposed else weight


def _routed(
    weights: Weights, part: _Part, config: ModelConfig, layer: int, hidden: Tensor, embedding: Tensor
) -> Tensor:
    """Mix the experts of one position."""
    if config.expert_input == "embedding":
        place = layer if config.expert_layers is None else config.expert_layers.index(layer)
        experts = _Part(weights, f"experts.{place}.")
        inputs = _norm(embedding, experts["norm.weight"], config)
        prefix = "experts."
    else:
        inputs, experts, prefix = hidden, part, "hidden_experts."
    logits = [row @ hidden for row in part["router.weight"]]
    chosen = sorted(range(len(logits)), key=lambda expert: -logits[expert].item())
    chosen = chosen[: len(logits) if config.top_k is None else config.top_k]
    total = sum((logits[expert].exp() for expert in chosen), torch.zeros_like(logits[0]))
    mixed = torch.zeros_like(hidden)
    for expert in chosen:
        if expert == config.num_experts:  # the null expert
            continue
        mixed = mixed + logits[expert].exp() / total * _ffn(inputs, _Matrices(experts, prefix, expert=expert), config)
    return mixed


def _attention(part: _Part, config: ModelConfig, normed: list[Tensor]) -> list[Tensor]:
    """Let every position look at itself and what came before, head by head."""
    num_heads = config.num_heads
    groups = num_heads if config.num_kv_heads is None else config.num_kv_heads
    width = config.hidden_size // num_heads if config.head_dim is None else config.head_dim

    def projected(hidden: Tensor, row: int) -> Tensor:
        """Return one head; the projection's rows are all query heads, then key heads, then value heads."""
        span = slice(row * width, (row + 1) * width)
        head = part["attention.qkv.weight"][span] @ hidden
        return head + part["attention.qkv.bias"][span] if config.attention_bias else head

    def placed(vector: Tensor, norm: str, position: int) -> Tensor:
        normed = _norm(vector, part[f"attention.{norm}_norm.weight"], config) if config.qk_norm else vector
        return _rotate(normed, position, config)

    attended: list[Tensor] = []
    for position in range(len(normed)):
        heads: list[Tensor] = []
        for head in range(num_heads):
            group = head * groups // num_heads  # neighboring heads share keys and values
            query = placed(projected(normed[position], head), "query", position)
            keys = [placed(projected(normed[other], num_heads + group), "key", other) for other in range(position + 1)]
            values = [projected(normed[other], num_heads + groups + group) for other in range(position + 1)]
            scores = [(query @ key / math.sqrt(width)).exp() for key in keys]
            total = sum(scores, torch.zeros_like(scores[0]))
            looked_at = [score / total * value for score, value in zip(scores, values, strict=True)]
            heads.append(sum(looked_at, torch.zeros_like(looked_at[0])))
        attended.append(part["attention.out.weight"] @ torch.cat(heads))
    return attended


def _rotate(vector: Tensor, position: int, config: ModelConfig) -> Tensor:
    """Turn the pair (i, i + K/2) by position * theta^(-2i/K), for every i below K/2, which Llama 3 scales."""
    half = len(vector) // 2
    rotated: list[Tensor] = [vector[0]] * len(vector)
    for i in range(half):
        angle = position * _scaled(config.rope_theta ** (-2 * i / len(vector)), config)
        cosine, sine = math.cos(angle), math.sin(angle)
        rotated[i] = vector[i] * cosine - vector[i + half] * sine
        rotated[i + half] = vector[i + half] * cosine + vector[i] * sine
    return torch.stack(rotated)


def _scaled(frequency: float, config: ModelConfig) -> float:
    """Llama 3: divide frequencies of long wavelengths, keep those of short ones, and interpolate in between."""
    if config.rope_scaling is None:
        return frequency
    scaling = config.rope_scaling
    wavelength, length = 2 * math.pi / frequency, scaling.original_max_position_embeddings
    if wavelength < length / scaling.high_freq_factor:
        return frequency
    if wavelength > length / scaling.low_freq_factor:
        return frequency / scaling.factor
    smooth = (length / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def _ffn(inputs: Tensor, matrices: _Matrices, config: ModelConfig) -> Tensor:
    """Two matrices with the exact GELU between them; in SwiGLU, the SiLU of a gate times the first takes its place."""
    inner = inputs @ matrices["up"]
    if config.activation == "gelu":
        return (inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))) @ matrices["down"]
    gate = inputs @ matrices["gate"]
    return (gate / (1 + torch.exp(-gate)) * inner) @ matrices["down"]


def _norm(vector: Tensor, weight: Tensor, config: ModelConfig) -> Tensor:
    return vector / torch.sqrt((vector * vector).mean() + config.norm_eps) * weight


def _norms(vectors: list[Tensor], weight: Tensor, config: ModelConfig) -> list[Tensor]:
    return [_norm(vector, weight, config) for vector in vectors]


def _add(left: list[Tensor], right: list[Tensor]) -> list[Tensor]:
    return [a + b for a, b in zip(left, right, strict=True)]
