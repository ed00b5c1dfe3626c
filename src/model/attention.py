"""Causal multi-head attention with rotary embedding, its cache of keys and values, and the masks of attention.

The rotary embedding covers the whole head and there are no biases. The norm in front belongs to the block.

B batch, T new tokens, S cached + new tokens, D hidden, H heads, K head dimension.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.model.config import ModelConfig
from src.model.products import Linear

FLOAT_COPY_BYTES = 8 * 2**20
"""Memory for the float32 copy of keys, or of values, of as many sequences as fit."""


class KeyValueCache:
    """Keys and values of the tokens seen so far, allocated once for `max_tokens`.

    It holds (L, B, H, max_tokens, K) twice. Each layer of a forward pass appends to it, and the model then adds to
    `length`. `scratch` is float32 memory for what `_attend_one` casts up. Every step reuses it, because fresh memory
    would cost a page fault per 4 KiB. It is empty where nothing is cast up.
    """

    def __init__(
        self, config: ModelConfig, batch_size: int, max_tokens: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.num_layers, batch_size, config.num_heads, max_tokens, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        values = config.num_heads * max_tokens * config.head_dim  # of one sequence in one layer
        group = min(batch_size, max(1, FLOAT_COPY_BYTES // (4 * values)))
        casts_up = dtype == torch.bfloat16 and device.type == "cpu"
        self.scratch = torch.empty(group * values if casts_up else 0, device=device, dtype=torch.float32)
        self.length = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, H, T, K) keys and values behind `length` and return all (B, H, S, K) of that layer."""
        new_tokens = keys.shape[2]
        end = self.length + new_tokens
        if end > self.keys.shape[3]:
            raise ValueError(f"the key-value cache holds {self.keys.shape[3]} tokens, but {end} were fed")
        all_keys, all_values = self.keys[layer], self.values[layer]
        all_keys.narrow(2, self.length, new_tokens).copy_(keys)  # half the time of an index, at each layer of each step
        all_values.narrow(2, self.length, new_tokens).copy_(values)
        return all_keys.narrow(2, 0, end), all_values.narrow(2, 0, end)


def rotary_table(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosine and sine, each (..., T, K) in `dtype`, for integer `positions` (..., T); halves, not pairs, rotate.

    `dtype` is at least float32: bfloat16 cannot count to a thousand. The sine's first half is negated, as `_rotate`
    needs it.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=dtype) / head_dim
    angles = positions.to(dtype).unsqueeze(-1) * theta**-exponents  # (..., T, K/2)
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat((cosine, cosine), dim=-1), torch.cat((-sine, sine), dim=-1)  # each (..., T, K)


def _rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    return torch.addcmul(heads * cosine, heads.roll(heads.shape[-1] // 2, dims=-1), sine)


class Attention(nn.Module):
    """Multi-head self-attention; query, key and value share one projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: KeyValueCache | None,
        layer: int,
    ) -> Tensor:
        """Attend over (B, T, D) and all cached tokens.

        `mask` is a boolean (B or 1, 1, T, S), True where a query may look; None means causal without a cache, and
        "everything cached" for a single new token.
        """
        qkv = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1))  # (B, T, 3, H, K)
        heads = qkv.permute(2, 0, 3, 1, 4)  # (3, B, H, T, K)
        cosine, sine = rotary[0].to(heads.dtype), rotary[1].to(heads.dtype)
        query, key = _rotate(heads[:2], cosine, sine).unbind(0)  # each (B, H, T, K)
        value = heads[2]
        if cache is not None:
            key, value = cache.append(layer, key, value)
        if query.shape[2] == 1 and cache is not None and len(cache.scratch):
            attended = _attend_one(query, key, value, mask, cache.scratch)
        else:
            causal = mask is None and query.shape[2] > 1
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        return self.out(attended.transpose(1, 2).flatten(2))  # (B, T, D)


def _attend_one(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scratch: Tensor) -> Tensor:
    """Attend from one new token (B, H, 1, K) over bfloat16 keys and values (B, H, S, K).

    torch's kernel for many queries takes twice to three times as long on a CPU as casting up and multiplying, and
    rounds more. Sequences go in groups whose float32 copies fit `scratch`.
    """
    num_heads, num_tokens, head_dim = key.shape[1:]
    group = max(1, len(scratch) // (num_heads * num_tokens * head_dim))
    if len(query) > group:
        masks = [mask] * len(query) if mask is None or len(mask) == 1 else mask.split(group)
        groups = zip(query.split(group), key.split(group), value.split(group), masks, strict=False)
        return torch.cat([_attend_one(*part, scratch) for part in groups])
    floats = scratch[: key.numel()].view(-1, num_tokens, head_dim)  # (B*H, S, K) of the keys, then of the values
    queries = query.reshape(-1, 1, head_dim).float().mul_(head_dim**-0.5)  # (B*H, 1, K)
    scores = torch.bmm(queries, floats.copy_(key.flatten(0, 1)).transpose(1, 2))  # (B*H, 1, S)
    if mask is not None:
        scores.view(len(query), num_heads, 1, -1).masked_fill_(~mask, -torch.inf)
    attended = torch.bmm(scores.softmax(dim=-1), floats.copy_(value.flatten(0, 1)))  # (B*H, 1, K)
    return attended.to(query.dtype).view(query.shape)


def causal_mask(num_new: int, num_total: int, device: torch.device) -> Tensor:
    """Return (1, 1, T, S) booleans: each of the T newest of S tokens sees itself and all earlier ones."""
    visible = torch.ones(num_new, num_total, dtype=torch.bool, device=device).tril(num_total - num_new)
    return visible.view(1, 1, num_new, num_total)


def segment_ids(token_ids: Tensor, separator_id: int) -> Tensor:
    """Return, for windows (B, T), which document each position belongs to (B, T) int64, counted from 0 per window.

    A separator belongs to the document that it ends.
    """
    ends = (token_ids == separator_id).long()
    return ends.cumsum(dim=-1) - ends


def document_mask(token_ids: Tensor, separator_id: int) -> Tensor:
    """Return booleans (B, T, T): True where the first position may attend to the second, being of one document.

    It is symmetric: combine it with a causal mask. Rotary positions need no reset, since only differences matter.
    """
    segments = segment_ids(token_ids, separator_id)
    return segments.unsqueeze(-1) == segments.unsqueeze(-2)
