"""The decoder. Dense, MoE and MoLE share this class; the two forms of MoLE differ in their `experts` attribute alone.

MoLE's blocks mix expert rows and do not know whether those were computed or read. MoE's blocks own their experts, which
read hidden states. Nothing here knows how models are trained or stored.

B batch, T new tokens, S cached + new tokens, D hidden, E experts, C choices of a router, V vocabulary, U unique ids.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from src.model.attention import Attention, KeyValueCache, causal_mask, rotary_table, static_positions_and_mask
from src.model.config import ModelConfig
from src.model.experts import (
    FEW_POSITIONS,
    EmbeddingExperts,
    ExpertRows,
    ExpertSource,
    FeedForward,
    HiddenExperts,
    expert_inputs,
    mix,
)
from src.model.products import Head, Linear, RMSNorm, TiedHead
from src.model.router import Router


class Block(nn.Module):
    """Pre-norm attention, then the sum of shared expert and routed mixture; one norm feeds FFN and router."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.shared_expert = (
            FeedForward(config.hidden_size, config.intermediate_size, config.activation)
            if config.intermediate_size
            else None
        )
        self.router = layer_router(config) if layer in config.mixture_layers else None
        self.hidden_experts = (
            HiddenExperts(config.num_experts, config.hidden_size, config.expert_intermediate_size, config.activation)
            if config.architecture == "moe"
            else None
        )

    def forward(
        self,
        hidden_states: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: KeyValueCache | None,
        layer: int,
        expert_rows: Tensor | Callable[[], Tensor] | None,
        inverse: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return hidden states (B, T, D) and router logits (B, T, C), None in a layer without experts.

        `expert_rows` (U, E, D) of this layer, or what waits for them, and `inverse` (B, T) are the arguments of `mix`.
        `expert_rows` is None in Dense and MoE, and in layers without experts.
        """
        hidden_states = hidden_states + self.attention(self.attention_norm(hidden_states), rotary, mask, cache, layer)
        normed = self.ffn_norm(hidden_states)
        if self.shared_expert is not None:
            hidden_states = hidden_states + self.shared_expert(normed)
        if self.router is None:
            return hidden_states, None
        routing = self.router(normed)
        if self.hidden_experts is not None:
            mixed = self.hidden_experts.mixture(normed, routing)
        else:
            assert expert_rows is not None
            rows = expert_rows if isinstance(expert_rows, Tensor) else expert_rows()
            mixed = mix(rows, routing, inverse)
        return hidden_states + mixed.to(hidden_states.dtype), routing.logits


def layer_router(config: ModelConfig) -> Router:
    """Return the router of a layer that has experts, with weights that are not drawn yet."""
    return Router(config.hidden_size, config.num_experts, config.top_k, null_expert=config.null_expert)


def _embedding(num_ids: int, hidden_size: int) -> nn.Embedding:
    """Return an embedding, on `meta` without drawing what has no storage: torch imports its compiler for that."""
    weight = torch.empty(num_ids, hidden_size)
    return nn.Embedding(num_ids, hidden_size, _weight=weight if weight.is_meta else None)


class TrunkOutput(NamedTuple):
    """What the blocks return, before the vocabulary head."""

    hidden_states: Tensor
    """(B, T, D), after the final norm."""
    router_logits: list[Tensor]
    """(B, T, C) of each layer that has experts."""
    inverse: Tensor | None
    """(B, T) int64: which of the U ids with expert rows each position holds; None without such rows."""


class Transformer(nn.Module):
    """Decoder-only language model: Dense, MoE or MoLE, as its config says.

    `experts` is the source of expert rows: `EmbeddingExperts` in the training form, a disk-backed module in the
    lookup form, None in models without embedding experts. Everything else is the *backbone*, MoE's experts included.
    """

    experts: ExpertSource | None
    has_row: Tensor | None
    """(V,) bool: the ids for which experts return something, none at first; None: all of them."""

    def __init__(self, config: ModelConfig, *, with_experts: bool = True) -> None:
        """Create the model with initial weights; `with_experts=False` creates the backbone alone."""
        super().__init__()
        self.config = config
        self.embedding = _embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.head: Head = (
            TiedHead(self.embedding) if config.tie_embeddings else Linear(config.hidden_size, config.vocab_size)
        )
        self.experts = EmbeddingExperts(config) if config.architecture == "mole" and with_experts else None
        some = torch.zeros(config.vocab_size, dtype=torch.bool) if config.expert_ids == "seen" else None
        self.register_buffer("has_row", some)
        self.reset_parameters()

    def compile_layers(self) -> None:
        """Compile blocks and experts in place. Finding distinct ids stays outside, because `unique` breaks graphs.

        The number of distinct ids changes every step: the second number makes that dimension dynamic, and later ones
        reuse the graph.
        """
        for block in self.blocks:
            if (experts := cast(Block, block).hidden_experts) is not None:
                experts.keep_groups_eager()
        for layer in (*self.blocks, *(self.experts if isinstance(self.experts, EmbeddingExperts) else ())):
            layer.compile()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw initial weights: N(0, init_std), smaller for projections into the residual stream; norms 1, biases 0."""
        output_std = self.config.init_std / (
            math.sqrt(2 * self.config.num_layers) if self.config.scale_output_init else 1
        )
        for name, parameter in self.named_parameters():
            if parameter.is_meta:
                continue
            if parameter.dim() == 1:
                parameter.fill_(0 if name.endswith(".bias") else 1)
            elif name.endswith(("attention.out.weight", "down.weight", "experts.down")):
                parameter.normal_(0, output_std)
            else:
                parameter.normal_(0, self.config.init_std)

    def forward(
        self, token_ids: Tensor, *, cache: KeyValueCache | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Return next-token logits (B, T, V) for `token_ids` (B, T) int64.

        Args:
            token_ids: ids in [0, V), on the CPU or the model's device, like `attention_mask`.
            cache: earlier keys and values; the new ones are appended.
            attention_mask: booleans (B, S), False where a position is padding; padding goes on the left, and S is
                all that a static cache holds. Or, without a cache, (B, T, T), True where the first position may attend
                to the second if that comes earlier; each must be allowed to see itself.
        """
        return self.head(self.hidden_states(token_ids, cache=cache, attention_mask=attention_mask))

    def hidden_states(
        self, token_ids: Tensor, *, cache: KeyValueCache | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Return (B, T, D) in front of `head`, so that a loss need not hold (B, T, V)."""
        return self.trunk(token_ids, cache=cache, attention_mask=attention_mask).hidden_states

    def trunk(
        self,
        token_ids: Tensor,
        *,
        cache: KeyValueCache | None = None,
        attention_mask: Tensor | None = None,
        expert_rows: ExpertRows | None = None,
        distinct: tuple[Tensor, Tensor] | None = None,
    ) -> TrunkOutput:
        """Return hidden states and router logits of `token_ids` (B, T).

        `expert_rows` are those of these ids, or of a superset, where `expert_rows()` or `StepRows` made them earlier;
        `distinct` is for `expert_rows()`. The other arguments are those of `forward`.
        """
        expert_rows = expert_rows or self.expert_rows(token_ids, distinct)
        device = self.embedding.weight.device
        token_ids = token_ids.to(device, non_blocking=True)
        attention_mask = None if attention_mask is None else attention_mask.to(device, non_blocking=True)
        positions, mask = self._positions_and_mask(token_ids, cache, attention_mask)
        dtype = torch.promote_types(self.embedding.weight.dtype, torch.float32)
        cosine, sine = rotary_table(positions, self.config, dtype)
        rotary = cosine.to(self.embedding.weight.dtype), sine.to(self.embedding.weight.dtype)  # once for all layers
        hidden_states = self.embedding(token_ids)  # (B, T, D)
        inverse = None if expert_rows is None or expert_rows.in_order else expert_rows.inverse
        router_logits: list[Tensor] = []
        for layer, block in enumerate(self.blocks):
            rows, place = None, len(router_logits)  # among the layers that have experts
            if expert_rows is not None and cast(Block, block).router is not None:
                of_layer = partial(expert_rows.layer_rows, place)
                rows = of_layer if expert_rows.awaited else of_layer()
            arguments = (hidden_states, rotary, mask, cache, layer, rows, inverse)
            if self.config.gradient_checkpointing and _is_trained(block, hidden_states):
                hidden_states, logits = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden_states, logits = block(*arguments)
            if logits is not None:
                router_logits.append(logits)
        if cache is not None:
            cache.length += token_ids.shape[1]
        row_of = None if expert_rows is None else expert_rows.inverse
        return TrunkOutput(self.norm(hidden_states), router_logits, row_of)

    def expert_rows(self, token_ids: Tensor, distinct: tuple[Tensor, Tensor] | None = None) -> ExpertRows | None:
        """Return what `trunk` mixes at `token_ids` (B, T), or None in models without embedding experts.

        `distinct` are ids (U,) and, for each position (B, T), which of them it holds, where that is known already.
        Rows of a table are requested here, so call it as soon as the ids are known. Ids on the CPU are sorted there,
        so that nothing waits for the model's device. Parameters of a sharded model are whole only after a `trunk`.
        """
        if self.experts is None:
            return None
        device, awaited = self.embedding.weight.device, not isinstance(self.experts, EmbeddingExperts)
        few = awaited and token_ids.numel() <= FEW_POSITIONS and not torch.is_grad_enabled()
        in_order = few or token_ids.numel() == 1
        if in_order or self.config.expert_execution == "per_token":
            ids = token_ids.flatten()
            inverse = torch.arange(token_ids.numel(), device=device).view_as(token_ids)
        else:
            ids, inverse = token_ids.unique(return_inverse=True) if distinct is None else distinct
            inverse = inverse.to(device, non_blocking=True)
        inputs = ids if awaited else expert_inputs(self.config, ids)  # a table's rows are those of its ids
        embeddings = self.embedding(inputs.to(device, non_blocking=True))  # (U, D)
        if self.has_row is not None and not awaited:  # experts have no biases: what they return for zeros is zero
            without = ~self.has_row[ids.to(device, non_blocking=True)]
            embeddings = embeddings.masked_fill(without.unsqueeze(-1), 0)
        layer_rows = self.experts.rows(ids, embeddings)
        return ExpertRows(layer_rows, inverse, awaited=awaited, in_order=in_order)

    @staticmethod
    def _positions_and_mask(
        token_ids: Tensor, cache: KeyValueCache | None, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        num_new, device = token_ids.shape[1], token_ids.device
        num_total = num_new if cache is None else cache.span(num_new)
        num_cached, mask_shape = num_total - num_new, None if attention_mask is None else attention_mask.shape
        if attention_mask is not None and mask_shape == (*token_ids.shape, num_new) and not num_cached:
            mask = causal_mask(num_new, num_new, device) & attention_mask.unsqueeze(1)  # (B, 1, T, T)
            return torch.arange(num_new, device=device), mask
        if mask_shape is not None and mask_shape != (token_ids.shape[0], num_total):
            raise ValueError(
                f"attention_mask has shape {tuple(mask_shape)}, expected (batch, cached + new tokens) = "
                f"({token_ids.shape[0]}, {num_total})"
            )
        if cache is not None and isinstance(cache.length, Tensor):
            return static_positions_and_mask(cache, num_new, attention_mask)
        if attention_mask is None:
            mask = causal_mask(num_new, num_total, device) if num_cached and num_new > 1 else None
            return torch.arange(num_cached, num_total, device=device), mask
        positions = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, num_cached:]  # (B, T)
        visible = causal_mask(num_new, num_total, device) & attention_mask[:, None, None, :]  # (B, 1, T, S)
        # A padding query sees nothing; let it see itself, or its softmax is NaN and poisons the values it writes.
        visible = visible | torch.eye(num_total, dtype=torch.bool, device=device)[num_cached:]
        return positions.unsqueeze(1), visible


def _is_trained(block: nn.Module, hidden_states: Tensor) -> bool:
    """Whether a backward pass reaches a block with this input: not in front of the first that is not frozen."""
    is_reached = hidden_states.requires_grad or any(weight.requires_grad for weight in block.parameters())
    return torch.is_grad_enabled() and is_reached


def parameter_part(name: str) -> Literal["backbone", "embedding", "experts", "routers"]:
    """Return the part of the model that the parameter, or buffer, with this dotted name belongs to."""
    components = name.split(".")
    if "experts" in components or "hidden_experts" in components:  # of MoLE, outside the blocks; of MoE, inside them
        return "experts"
    if "router" in components or name == "has_row":
        return "routers"
    return "embedding" if "embedding" in components else "backbone"
