"""Causal multi-head attention with rotary embedding, its cache of keys and values, and the masks of attention.

The rotary embedding covers the whole head. The norm in front belongs to the block.

B batch, T new tokens, S cached + new tokens, D hidden, H heads, G heads of keys and values, K head dimension.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.model.config import ModelConfig
from src.model.products import Linear, RMSNorm
from src.system.huge_pages import huge_bytes

FLOAT_COPY_BYTES = 4 * 2**20
"""Memory for the float32 copy of keys, or of values, of as many heads as fit: few enough to stay in a cache."""
EVEN_HEADS = 8
"""More heads than this are copied in multiples of it, so that each thread multiplies what it copied itself."""
FEW_QUERIES = 3
"""Up to this many queries per head of keys, summing bfloat16 values takes less time than casting and multiplying."""
SUMS_FAST = "fbgemm" in torch.backends.quantized.supported_engines
"""Whether this torch has vector code for `embedding_bag` in bfloat16; elsewhere it is a scalar loop."""


class KeyValueCache:
    """Keys and values of the tokens seen so far, allocated once for `max_tokens`.

    It holds (L, B, G, max_tokens, K) twice. Each layer of a forward pass appends to it, and the model then adds to
    `length`. `scratch` is float32 memory for what `_attend_in_float32` casts up. Every step reuses it, because fresh
    memory would cost a page fault per 4 KiB. It is empty where nothing is cast up.

    With `static`, `length` is a tensor () int64 on the device, and attention covers `max_tokens` with a mask. Then each
    step of a batch does the same on tensors of the same shapes, as CUDA graphs require. Nothing waits for the length to
    check it.
    """

    length: int | Tensor

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_tokens: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        static: bool = False,
    ) -> None:
        shape = (config.num_layers, batch_size, config.kv_heads, max_tokens, config.attention_head_dim)
        self.keys, self.values = (_zeros(shape, device, dtype) for _ in range(2))  # what is hidden must not be NaN
        values = max_tokens * config.attention_head_dim  # of one head in one layer
        group = min(batch_size * config.kv_heads, max(1, FLOAT_COPY_BYTES // (4 * values)))
        casts_up = dtype == torch.bfloat16 and device.type == "cpu"
        self.scratch = torch.empty(group * values if casts_up else 0, device=device, dtype=torch.float32)
        self.length = torch.zeros((), device=device, dtype=torch.int64) if static else 0
        self._bags: tuple[tuple[int, ...], Tensor, Tensor] | None = None

    def span(self, new_tokens: int) -> int:
        """Return how many tokens attention covers, masked or not, when `new_tokens` are appended."""
        return self.keys.shape[3] if isinstance(self.length, Tensor) else self.length + new_tokens

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, G, T, K) keys and values behind `length` and return all (B, G, S, K) of that layer."""
        new_tokens, all_keys, all_values = keys.shape[2], self.keys[layer], self.values[layer]
        if isinstance(self.length, Tensor):
            places = self.length + torch.arange(new_tokens, device=keys.device)  # (T,)
            return all_keys.index_copy_(2, places, keys), all_values.index_copy_(2, places, values)
        end = self.span(new_tokens)
        if end > self.keys.shape[3]:
            raise ValueError(f"the key-value cache holds {self.keys.shape[3]} tokens, but {end} were fed")
        all_keys.narrow(2, self.length, new_tokens).copy_(keys)  # half the time of an index, at each layer of each step
        all_values.narrow(2, self.length, new_tokens).copy_(values)
        return all_keys.narrow(2, 0, end), all_values.narrow(2, 0, end)

    def sum_values(self, layer: int, weights: Tensor) -> Tensor:
        """Return the sums (B*G*Q, K) of a layer's values, in their dtype; uses up the `weights` (B*G, Q, S) float32.

        One `embedding_bag` reads each bfloat16 value where it lies and adds in float32. Its weights are bfloat16, too,
        so each value has two: the float32 weight cut to 8 bits, and what is left of it, rounded to 8 bits.
        """
        num_heads, num_queries, num_tokens = weights.shape
        if self._bags is None or self._bags[0] != weights.shape:  # once a step, for all layers
            first = torch.arange(num_heads, dtype=torch.int32).view(-1, 1, 1) * self.values.shape[3]
            rows = first + torch.arange(num_tokens, dtype=torch.int32).repeat_interleave(2)  # (B*G, 1, 2*S)
            starts = torch.arange(0, 2 * weights.numel(), 2 * num_tokens, dtype=torch.int32)
            self._bags = weights.shape, rows.expand(-1, num_queries, -1).flatten(), starts
        _, rows, starts = self._bags
        bits = weights.view(torch.int32)  # whose upper half is a bfloat16, and the lower one becomes another
        upper = bits & -(2**16)
        weights.sub_(upper.view(torch.float32))  # exact, and not negative
        pairs = bits.add_(2**15).bitwise_right_shift_(16).bitwise_or_(upper).view(torch.bfloat16)  # (B*G, Q, 2*S)
        table = self.values[layer].flatten(0, 2)  # (B*G*max_tokens, K)
        return F.embedding_bag(rows, table, starts, mode="sum", per_sample_weights=pairs.flatten())


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    return huge_bytes(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


def rotary_frequencies(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the angles per position (K/2,) in `dtype`, scaled as Llama 3 does if the config says so."""
    exponents = torch.arange(0, config.attention_head_dim, 2, device=device, dtype=dtype) / config.attention_head_dim
    frequencies = config.rope_theta**-exponents  # (K/2,)
    if (scaling := config.rope_scaling) is None:
        return frequencies
    turns = frequencies * (scaling.original_max_position_embeddings / (2 * math.pi))  # over the original length
    band = scaling.high_freq_factor - scaling.low_freq_factor
    kept = ((turns - scaling.low_freq_factor) / band).clamp(0, 1)  # 1 where the frequency is high
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rotary_table(positions: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosine and sine, each (..., T, K) in `dtype`, for integer `positions` (..., T); halves, not pairs, rotate.

    `dtype` is at least float32: bfloat16 cannot count to a thousand. The sine's first half is negated, as `_rotate`
    needs it.
    """
    angles = positions.to(dtype).unsqueeze(-1) * rotary_frequencies(config, positions.device, dtype)  # (..., T, K/2)
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat((cosine, cosine), dim=-1), torch.cat((-sine, sine), dim=-1)  # each (..., T, K)


def _rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    return torch.addcmul(heads * cosine, heads.roll(heads.shape[-1] // 2, dims=-1), sine)


class HeadNorm(RMSNorm):
    """RMSNorm of each head (..., K), in the weight's precision also under autocast, as the block's norms compute."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class Attention(nn.Module):
    """Self-attention of many heads; query, key and value share one projection, and heads may share keys and values."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.kv_heads, head_dim = config.num_heads, config.kv_heads, config.attention_head_dim
        outputs = (self.num_heads + 2 * self.kv_heads) * head_dim
        self.qkv = Linear(config.hidden_size, outputs, bias=config.attention_bias)
        self.query_norm = HeadNorm(head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.key_norm = HeadNorm(head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.out = Linear(self.num_heads * head_dim, config.hidden_size)

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
        query, key, value = self._heads(hidden_states, rotary)
        if cache is not None:
            key, value = cache.append(layer, key, value)
        if query.shape[2] == 1:
            attended = _attend_one(query, key, value, mask, cache, layer)
        else:
            key, value = (_repeated(heads, self.num_heads // self.kv_heads) for heads in (key, value))
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        return self.out(attended.transpose(1, 2).flatten(2))  # (B, T, D)

    def _heads(self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rotated queries (B, H, T, K) and keys (B, G, T, K), and the values (B, G, T, K)."""
        rotated = self.num_heads + self.kv_heads
        heads = self.qkv(hidden_states).view(*hidden_states.shape[:2], rotated + self.kv_heads, -1).transpose(1, 2)
        turning, value = heads.narrow(1, 0, rotated), heads.narrow(1, rotated, self.kv_heads)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = turning.split((self.num_heads, self.kv_heads), dim=1)
            turning = torch.cat((self.query_norm(query), self.key_norm(key)), dim=1)
        cosine, sine = rotary[0].to(turning.dtype), rotary[1].to(turning.dtype)
        turned = _rotate(turning, cosine, sine)  # (B, H + G, T, K)
        return turned.narrow(1, 0, self.num_heads), turned.narrow(1, self.num_heads, self.kv_heads), value


def _repeated(heads: Tensor, times: int) -> Tensor:
    """Return keys or values (B, G, S, K) once for each query head (B, H, S, K); views of many heads are no kernel's."""
    return heads if times == 1 else heads.unsqueeze(2).expand(-1, -1, times, -1, -1).flatten(1, 2)


def _attend_one(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, cache: KeyValueCache | None, layer: int
) -> Tensor:
    """Attend from one new token (B, H, 1, K) over keys and values (B, G, S, K), which are those of `cache`, if any.

    The H / G heads that share keys become as many queries of one head. Repeating the keys for them, as `enable_gqa`
    does on a CPU, takes 5 to 7 times as long.
    """
    queries = query.reshape(len(query), key.shape[1], -1, query.shape[-1])  # (B, G, H / G, K)
    if cache is not None and len(cache.scratch) and not query.requires_grad:
        attended = _attend_in_float32(queries, key, value, mask, cache, layer)
    else:
        attended = F.scaled_dot_product_attention(queries, key, value, attn_mask=mask)
    return attended.reshape(query.shape)


def _attend_in_float32(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, cache: KeyValueCache, layer: int
) -> Tensor:
    """Attend from queries (B, G, Q, K) of one new token over bfloat16 keys and values (B, G, S, K).

    torch's kernel for many queries takes three times as long on a CPU, and rounds more.
    """
    queries = query.flatten(0, 1).float().mul_(query.shape[-1] ** -0.5)  # (B*G, Q, K)
    scores = _cast_product(queries, key.transpose(2, 3), cache.scratch)  # (B*G, Q, S)
    if mask is not None:
        scores.view(*query.shape[:3], -1).masked_fill_(~mask, -torch.inf)
    weights = scores.softmax(dim=-1)
    if SUMS_FAST and query.shape[2] <= FEW_QUERIES:
        return cache.sum_values(layer, weights)
    return _cast_product(weights, value, cache.scratch).to(query.dtype)


def _cast_product(inputs: Tensor, matrices: Tensor, scratch: Tensor) -> Tensor:
    """Return (B*G, Q, F) float32: inputs (B*G, Q, D) float32 times bfloat16 matrices (B, G, D, F).

    Heads go in groups whose float32 copies fit `scratch`; each is copied in the order of memory.
    """
    is_transposed = matrices.stride(3) != 1
    stored = (matrices.mT if is_transposed else matrices).flatten(0, 1)
    _, rows, columns = stored.shape
    group = max(1, len(scratch) // (rows * columns))
    group -= group % EVEN_HEADS if group > EVEN_HEADS else 0
    copies = scratch[: group * rows * columns].view(group, rows, columns)
    products = inputs.new_empty(*inputs.shape[:2], matrices.shape[3])
    for left, right, product in zip(inputs.split(group), stored.split(group), products.split(group), strict=True):
        floats = copies[: len(right)].copy_(right)
        torch.bmm(left, floats.mT if is_transposed else floats, out=product)
    return products


def causal_mask(num_new: int, num_total: int, device: torch.device) -> Tensor:
    """Return (1, 1, T, S) booleans: each of the T newest of S tokens sees itself and all earlier ones."""
    visible = torch.ones(num_new, num_total, dtype=torch.bool, device=device).tril(num_total - num_new)
    return visible.view(1, 1, num_new, num_total)


def static_positions_and_mask(
    cache: KeyValueCache, num_new: int, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return positions (T,) or (B, 1, T) and booleans (1 or B, 1, T, S) of new tokens behind a length that is a tensor.

    `attention_mask` (B, S) is False where a position is padding; S is all that the cache holds.
    """
    every = torch.arange(cache.span(num_new), device=cache.keys.device)  # (S,)
    places = cache.length + every[:num_new]  # (T,)
    visible = (every <= places.unsqueeze(1)).view(1, 1, num_new, -1)  # (1, 1, T, S)
    if attention_mask is None:
        return places, visible
    positions = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0).index_select(1, places)  # (B, T)
    itself = every == places.unsqueeze(1)  # what padding sees, or its softmax would be NaN
    return positions.unsqueeze(1), visible & attention_mask[:, None, None, :] | itself


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
