"""Feed-forward networks, routed experts, and the mixture of what experts return: the heart of MoLE.

MoLE mixes *expert rows*: for each distinct token id, what each expert returns for its embedding. In the training form
the rows are computed here, in the lookup form they are fetched; `mix` does not know which. Experts that read hidden
states (the MoE baseline, and the steps between it and MoLE) return something that depends on the context, so it
cannot become a table; they belong to the backbone.

B batch, T tokens, N = B*T, D hidden, F intermediate, E experts, K experts mixed per token, L layers, U unique ids.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from src.model.config import Activation, ModelConfig
from src.model.products import Linear, computed_dtype, linear, product, stacked_product
from src.model.router import Routing

LayerRows = Callable[[int], Tensor]
"""Index among the layers that have experts -> their rows (U, E, D) of the ids it was made for."""


class ExpertRows(NamedTuple):
    """The rows that some positions mix, made or requested before the model runs on them."""

    layer_rows: LayerRows
    inverse: Tensor
    """(B, T) int64: which of the U ids each position holds."""
    awaited: bool = False
    """Whether `layer_rows` waits for a disk. A block then calls it right before it mixes; other rows are passed to
    the block as a tensor, which is what compiling and checkpointing want."""
    in_order: bool = False
    """Whether each position has a row of its own, in the order of positions: U = B*T."""


FEW_POSITIONS = 64
"""Up to so many positions, inference gathers rows instead of indexing them: from a table once, not in each layer."""


class ExpertSource(Protocol):
    """Where a model's expert rows come from: computed (`EmbeddingExperts`) or fetched from a table."""

    def rows(self, token_ids: Tensor, token_embeddings: Tensor) -> LayerRows:
        """Return the rows of `token_ids` (U,) int64 with embeddings (U, D), layer by layer, on the embeddings' device.

        A source that reads starts to do so here, and waits when a layer is asked for. It gets repeated ids where there
        are at most `FEW_POSITIONS`, and may get ids on the CPU.
        """
        ...


def ffn(
    inputs: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None = None,
    *,
    multiply: Callable[[Tensor, Tensor], Tensor] = product,
    scales: Tensor | None = None,
) -> Tensor:
    """Return the feed-forward network of every model here on (..., D), no bias: `down` of the activations.

    Those are the exact (erf) GELU of `up`, or, with a `gate`, SwiGLU: the SiLU of `gate` times `up`. `multiply` decides
    the layout of the weights: `product` takes (D, F) and (F, D), `stacked_product` E of them, `linear` their
    transposes. `scales` (..., E) weigh E equal parts of the activations.
    """
    inner = multiply(inputs, up)  # (..., F)
    inner = F.gelu(inner) if gate is None else F.silu(multiply(inputs, gate)) * inner
    if scales is not None:
        parts = inner.unflatten(-1, (scales.shape[-1], -1))  # (..., E, F / E)
        inner = (parts * scales.unsqueeze(-1).to(parts.dtype)).flatten(-2)  # (..., F)
    return multiply(inner, down)


def ffn_matrices(activation: Activation) -> tuple[str, ...]:
    """Return the names of an FFN's weights, in the order in which `ffn` takes them."""
    return ("up", "down") if activation == "gelu" else ("up", "down", "gate")


class StackedExperts(nn.Module):
    """E FFNs as batched matrix products; `up` is (E, D, F), `down` is (E, F, D), and SwiGLU's `gate` is (E, D, F)."""

    def __init__(
        self, num_experts: int, hidden_size: int, intermediate_size: int, activation: Activation = "gelu"
    ) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.down = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.gate = None if activation == "gelu" else nn.Parameter(torch.empty_like(self.up))

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """What `ffn` takes: `up`, `down` and, with SwiGLU, `gate`."""
        return (self.up, self.down) if self.gate is None else (self.up, self.down, self.gate)

    def forward(self, inputs: Tensor) -> Tensor:
        """Run every expert on every row of (U, D); return (U, E, D), a view of an (E, U, D) tensor.

        `matmul` of (U, D) with (E, D, F) would copy `up` and the result to make one product of E; this is a quarter
        to a third faster on a CPU.
        """
        shared = inputs.expand(len(self.up), -1, -1)  # (E, U, D)
        return ffn(shared, *self.weights, multiply=stacked_product).transpose(0, 1)  # (U, E, D)


class LayerExperts(nn.Module):
    """One layer's experts on the token embedding, behind that layer's own norm (arXiv:2503.15798, Appendix A)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        width = config.expert_intermediate_size
        self.experts = StackedExperts(config.num_experts, config.hidden_size, width, config.activation)

    def forward(self, token_embeddings: Tensor) -> Tensor:
        """Return the expert rows (U, E, D) of token embeddings (U, D)."""
        return self.experts(self.norm(token_embeddings))


@lru_cache(maxsize=8)
def _permutation(vocab_size: int, seed: int) -> Tensor:
    return torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed))


def expert_inputs(config: ModelConfig, token_ids: Tensor) -> Tensor:
    """Return the ids whose embeddings the experts of `token_ids` (U,) int64 read: themselves, except in controls."""
    if config.shared_expert_row:
        return torch.zeros_like(token_ids)
    if config.expert_permutation is None:
        return token_ids
    return _permutation(config.vocab_size, config.expert_permutation).to(token_ids.device)[token_ids]


class EmbeddingExperts(nn.ModuleList):
    """The training form's source of rows: `LayerExperts` of each of `mixture_layers`, run on embeddings of ids."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(LayerExperts(config) for _ in config.mixture_layers)
        self.gradient_checkpointing = config.gradient_checkpointing

    def rows(self, token_ids: Tensor, token_embeddings: Tensor) -> LayerRows:
        """Compute rows from `token_embeddings` (U, D), one layer when it is asked for."""

        def layer_rows(layer: int) -> Tensor:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                return checkpoint(self[layer], token_embeddings, use_reentrant=False, preserve_rng_state=False)
            return self[layer](token_embeddings)

        return layer_rows


def mix(expert_rows: Tensor, routing: Routing, inverse: Tensor | None) -> Tensor:
    """Return sum_j g_j * v_j[token] as (B, T, D): h' - h - FFN_shared(h) of arXiv:2503.15798, section 3.

    `expert_rows` is (U, E, D), `inverse` (B, T) says which of the U ids each position holds; None: its own, in order.
    """
    positions = routing.logits.shape[:-1]  # (B, T)
    if positions.numel() <= FEW_POSITIONS and routing.experts is None and not torch.is_grad_enabled():
        return _mix_few(expert_rows, routing.weights, inverse)
    num_ids, num_experts, hidden_size = expert_rows.shape
    if inverse is None:
        inverse = torch.arange(num_ids, device=expert_rows.device).view(positions)
    experts = torch.arange(num_experts, device=inverse.device) if routing.experts is None else routing.experts
    by_expert = expert_rows.transpose(0, 1)
    if by_expert.is_contiguous():  # as `StackedExperts` returns them: number rows expert-major and copy nothing
        table, index = by_expert.reshape(-1, hidden_size), experts * num_ids + inverse.unsqueeze(-1)
    else:
        rows = expert_rows.to(torch.promote_types(expert_rows.dtype, torch.float32))  # casting a slice copies it once
        table, index = rows.reshape(-1, hidden_size), inverse.unsqueeze(-1) * num_experts + experts
    return weighted_sum(table, index, routing.weights)  # (B, T, D)


def _mix_few(expert_rows: Tensor, weights: Tensor, inverse: Tensor | None) -> Tensor:
    """Mix as `mix` does with a third of the calls, which are what a decode step's mixture costs.

    Several rows are gathered first, so that both forms multiply tensors of one layout and round alike.
    """
    rows = expert_rows if inverse is None else expert_rows.index_select(0, inverse.flatten())  # (B*T, E, D)
    rows = rows.to(weights.dtype)
    if weights.shape[1] == 1:  # a decode step
        return torch.bmm(weights, rows)  # (B, 1, D)
    mixed = torch.bmm(weights.reshape(len(rows), 1, -1), rows)  # (B*T, 1, D)
    return mixed.view(*weights.shape[:-1], -1)  # (B, T, D)


def weighted_sum(table: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Return sum_k weights[..., k] * table[index[..., k]] as (..., D); `table` is (R, D), the others are (..., K).

    One `embedding_bag` is the whole sum: no (..., K, D) tensor exists in either direction. Rows are cast up to at
    least float32 first, because a frequent row's gradient sums hundreds of positions and bfloat16 would lose them.
    """
    dtype = torch.promote_types(table.dtype, torch.float32)
    flat_weights = weights.flatten(0, -2).to(dtype)
    summed = F.embedding_bag(index.flatten(0, -2), table.to(dtype), per_sample_weights=flat_weights, mode="sum")
    return summed.unflatten(0, index.shape[:-1])  # (..., D)


RunGroups = Callable[[Tensor, Tensor, Sequence[Tensor]], Tensor]
"""Runs expert e of `StackedExperts.weights` on the next `counts[e]` rows of (N*K, D), and returns (N*K, D)."""


def run_groups_in_turn(grouped: Tensor, counts: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Run one expert after another; waits for the device to learn the counts."""
    # `unbind` gives the stacked weight one gradient; indexing would give it a full-size one per expert.
    by_expert = zip(*(weight.unbind(0) for weight in weights), strict=True)
    groups = zip(grouped.split(counts.tolist()), by_expert, strict=True)
    return torch.cat([ffn(tokens, *matrices) for tokens, matrices in groups if len(tokens)])


def run_groups_at_once(grouped: Tensor, counts: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Run all experts in grouped matrix products, one per matrix, without a wait for the device.

    Their rows must be multiples of 16 bytes, so odd sizes are filled with zeros, of which the activation is zero too.
    """
    hidden_size, inner_size = weights[0].shape[1:]
    dtype = computed_dtype(grouped)
    ends, multiple = counts.cumsum(0).to(torch.int32), 16 // dtype.itemsize
    more_hidden, more_inner = -hidden_size % multiple, -inner_size % multiple
    tokens = F.pad(grouped.to(dtype), (0, more_hidden))
    into, out = (0, more_inner, 0, more_hidden), (0, more_hidden, 0, more_inner)
    filled = [F.pad(weight.to(dtype), out if index == 1 else into) for index, weight in enumerate(weights)]
    return ffn(tokens, *filled, multiply=partial(F.grouped_mm, offs=ends))[:, :hidden_size]


def choose_run_groups(device: torch.device, dtype: torch.dtype) -> RunGroups:
    """Return how a device that computes in `dtype` runs experts on their own tokens.

    At once where it has grouped products in one kernel: in bfloat16, on CUDA from compute capability 9.0 on, never on a
    CPU. Elsewhere torch's grouped products are a loop that waits, too.
    """
    if device.type == "cpu" or dtype != torch.bfloat16:
        return run_groups_in_turn
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0)
    return run_groups_in_turn if old else run_groups_at_once


class HiddenExperts(StackedExperts):
    """E FFNs on hidden states, mixed by what the router decided; no token is ever dropped."""

    _in_turn: RunGroups = staticmethod(run_groups_in_turn)

    def keep_groups_eager(self) -> None:
        """Keep the loop over groups out of compiled graphs, which its changing sizes would recompile every step."""
        eager: Any = torch.compiler.disable(run_groups_in_turn)  # not a decorator: that imports the compiler
        self._in_turn = eager

    def mixture(self, hidden_states: Tensor, routing: Routing) -> Tensor:
        """Return sum_j g_j * FFN_j(h) over the chosen experts as (B, T, D), of normed hidden states (B, T, D)."""
        inputs = hidden_states.flatten(0, 1)  # (N, D)
        if routing.experts is None:
            mixed = self._mix_all(inputs, routing.weights.flatten(0, 1))
        else:
            mixed = self._mix_chosen(inputs, routing.weights.flatten(0, 1), routing.experts.flatten(0, 1))
        return mixed.view(hidden_states.shape)  # (B, T, D)

    def _mix_all(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """Mix every expert: together they are one FFN of width E*F whose activations are scaled by `weights` (N, E).

        The sum over experts happens inside the last matrix product, so no (N, E, D) tensor exists.
        """
        wide_up = self.up.transpose(0, 1).flatten(1)  # (D, E*F)
        wide_gate = None if self.gate is None else self.gate.transpose(0, 1).flatten(1)
        return ffn(inputs, wide_up, self.down.flatten(0, 1), wide_gate, scales=weights)  # (N, D)

    def _mix_chosen(self, inputs: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Mix the `experts` (N, K) of each token: sort the N*K assignments by expert, so each runs once on its tokens.

        Nothing here adds in an order that may change, so recomputing it in the backward pass routes alike.
        """
        top_k = experts.shape[1]
        order = experts.flatten().argsort(stable=True)  # (N*K,) assignments, expert by expert
        counts = experts.flatten().new_zeros(len(self.up)).scatter_add(0, experts.flatten(), torch.ones_like(order))
        at_once = choose_run_groups(inputs.device, computed_dtype(inputs)) is run_groups_at_once
        run_groups = run_groups_at_once if at_once else self._in_turn
        outputs = run_groups(inputs.index_select(0, order // top_k), counts, self.weights)  # (N*K, D)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))  # (N*K,)
        return weighted_sum(outputs, place.view(-1, top_k), weights)  # (N, D)


class FeedForward(nn.Module):
    """Dense's FFN, MoLE's always-on shared expert."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: Activation = "gelu") -> None:
        super().__init__()
        self.up = Linear(hidden_size, intermediate_size)
        self.down = Linear(intermediate_size, hidden_size)
        self.gate = None if activation == "gelu" else Linear(hidden_size, intermediate_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate = None if self.gate is None else self.gate.weight
        return ffn(hidden_states, self.up.weight, self.down.weight, gate, multiply=linear)
