"""One decoder block of Dense, MoE and MoLE alike.

MoLE's block mixes expert rows and never asks where they came from; MoE's owns its experts, for they read hidden states.

B batch, T tokens, D hidden, E experts, U unique token ids.
"""

from torch import Tensor, nn

from src.model.attention import Attention, KeyValueCache
from src.model.config import ModelConfig
from src.model.experts import mix
from src.model.feed_forward import FeedForward
from src.model.hidden_experts import HiddenExperts
from src.model.router import Router


class Block(nn.Module):
    """Pre-norm attention, then the sum of shared expert and routed mixture; one norm feeds FFN and router."""

    def __init__(self, config: ModelConfig) -> None:
        """Create the resident part of one layer: everything but experts that read embeddings."""
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.shared_expert = (
            FeedForward(config.hidden_size, config.intermediate_size) if config.intermediate_size else None
        )
        self.router = Router(config.hidden_size, config.num_experts, config.top_k) if config.num_experts else None
        self.hidden_experts = (
            HiddenExperts(config.num_experts, config.hidden_size, config.expert_intermediate_size)
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
        expert_rows: Tensor | None,
        inverse: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return hidden states (B, T, D) and router logits (B, T, E), None in a dense model.

        `expert_rows` (U, E, D) and `inverse` (B, T) are those of this layer (see `mix`); None in Dense and MoE.
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
            assert expert_rows is not None and inverse is not None
            mixed = mix(expert_rows, routing, inverse)
        return hidden_states + mixed.to(hidden_states.dtype), routing.logits
