"""Mixture of Lookup Experts (arXiv:2503.15798) for transformers: the model, and the table that its experts became.

The experts of a MoLE read nothing but the token's embedding, so what they return for each token id is stored in a
table, the folder `lut/` next to the weights. A forward pass reads the rows of its token ids from disk and mixes them as
the routers say. Dense models and mixtures of experts that read hidden states are the same class without a table.

B batch, T new tokens, S cached + new tokens, D hidden, H heads, G heads of keys and values, K head dimension, F
intermediate, E experts, L layers, N tokens, U distinct ids, V vocabulary.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_mole import MoleConfig
from .lookup_table import LookupTable

CHUNK_BYTES = 16 * 2**20
"""Rows of the table in memory at a time: tokens that need more are computed in turn, with a cache of keys."""


def rotary_table(positions: Tensor, config: MoleConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosine and sine (B or 1, 1, T, K) for positions (B or 1, T); computed in float32."""
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32) / config.head_dim
    frequencies = config.rope_theta**-exponents  # (K/2,)
    if (scaling := config.llama3_rope_scaling) is not None:
        turns = frequencies * (scaling["original_max_position_embeddings"] / (2 * math.pi))
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / scaling["factor"])
    angles = positions.float()[:, None, :, None] * frequencies
    return angles.cos().repeat(1, 1, 1, 2).to(dtype), angles.sin().repeat(1, 1, 1, 2).to(dtype)


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn heads (B, H, T, K), whose halves are pairs."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cosine + torch.cat((-second, first), dim=-1) * sine


def visible_tokens(given: Tensor | None, start: int, piece: slice, device: torch.device) -> Tensor | None:
    """Return what a piece of the tokens behind `start` others may attend to, (B or 1, 1, T, S); None: all before.

    `given` (B, S) is zero where a token is padding; or it is such a mask already, as for a static cache.
    """
    if given is not None and given.dim() == 4:
        return given[:, :, piece]
    before, total = start + piece.start, start + piece.stop
    padding = None if given is None or given[:, :total].all() else given[:, None, None, :total].to(device).bool()
    if padding is None and (before == 0 or total - before == 1):
        return None
    mask = torch.ones(total - before, total, dtype=torch.bool, device=device).tril(before)
    if padding is None:
        return mask[None, None]
    return mask & padding | torch.eye(total, dtype=torch.bool, device=device)[before:]  # or padding would see nothing


def token_positions(padding: Tensor | None, start: int, tokens: Tensor) -> Tensor:
    """Return the positions (B or 1, T) of `tokens` (B, T, ...) behind `start` others; padding has none."""
    total = start + tokens.shape[1]
    if padding is None or padding.dim() != 2:
        return torch.arange(start, total, device=tokens.device).unsqueeze(0)
    return (padding[:, :total].long().cumsum(dim=1) - 1).clamp(min=0)[:, start:]


class MoleAttention(nn.Module):
    """Causal self-attention; queries, keys and values share one projection, and heads may share keys and values."""

    def __init__(self, config: MoleConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        self.qkv = nn.Linear(config.hidden_size, sum(self.heads) * self.head_dim, bias=config.attention_bias)
        self.query_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.key_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.out = nn.Linear(self.heads[0] * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any | None
    ) -> Tensor:
        """Attend over (B, T, D) and what the cache holds; `mask` is that of `visible_tokens`."""
        heads = self.qkv(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H + 2G, T, K)
        query, key, value = heads.split(self.heads, dim=1)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)  # (B, G, S, K)
        mask, groups = None if mask is None else mask[..., : key.shape[2]], self.heads[0] // self.heads[1]
        key, value = (part.repeat_interleave(groups, dim=1) if groups > 1 else part for part in (key, value))
        causal = mask is None and query.shape[2] > 1
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        return self.out(attended.transpose(1, 2).flatten(2))  # (B, T, D)


class MoleFeedForward(nn.Module):
    """The FFN that every token takes."""

    def __init__(self, config: MoleConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        gated = config.hidden_act == "swiglu"
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=False) if gated else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return (..., D) of (..., D)."""
        inner = self.up(hidden_states)
        inner = F.gelu(inner) if self.gate is None else F.silu(self.gate(hidden_states)) * inner
        return self.down(inner)


class MoleRouter(nn.Linear):
    """Scores experts in at least float32, since rounding would change which are chosen."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Return logits (B, T, E) of (B, T, D)."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return F.linear(input.to(dtype), self.weight.to(dtype))


class MoleHiddenExperts(nn.Module):
    """Experts that read hidden states, as weights: `up` and `gate` are (E, D, F), `down` is (E, F, D)."""

    def __init__(self, config: MoleConfig) -> None:
        super().__init__()
        shape, std = (config.num_experts, config.hidden_size, config.expert_intermediate_size), config.initializer_range
        self.up = nn.Parameter(torch.randn(shape) * std)
        self.down = nn.Parameter(torch.randn(shape[0], shape[2], shape[1]) * std)
        self.gate = nn.Parameter(torch.randn(shape) * std) if config.hidden_act == "swiglu" else None

    def forward(self, hidden_states: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Return the sum over each token's `experts` (B, T, K), times their `weights` (B, T, K), of (B, T, D)."""
        inputs, mixed = hidden_states.flatten(0, 1), torch.zeros_like(hidden_states, dtype=weights.dtype).flatten(0, 1)
        for expert in range(len(self.up)):
            tokens, choice = (experts.flatten(0, 1) == expert).nonzero(as_tuple=True)
            inner = inputs[tokens] @ self.up[expert]
            inner = F.gelu(inner) if self.gate is None else F.silu(inputs[tokens] @ self.gate[expert]) * inner
            outputs = (inner @ self.down[expert]).to(weights.dtype)  # (N, D)
            mixed = mixed.index_add(0, tokens, outputs * weights.flatten(0, 1)[tokens, choice, None])
        return mixed.view(hidden_states.shape)


class MoleBlock(nn.Module):
    """Attention, then the sum of the FFN and of what the experts return."""

    def __init__(self, config: MoleConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = MoleAttention(config, layer)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.shared_expert = MoleFeedForward(config) if config.intermediate_size else None
        routed, self.num_experts = layer in config.mixture_layers, config.num_experts
        choices = config.num_experts + config.null_expert
        self.router = MoleRouter(config.hidden_size, choices, bias=False) if routed else None
        self.hidden_experts: Any = MoleHiddenExperts(config) if routed and not config.has_table else None
        self.top_k = config.num_experts_per_tok or choices

    def forward(
        self,
        hidden_states: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Any | None,
        rows: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Return (B, T, D); `rows` are the experts' vectors (U, E, D) and which of them each token has, (B, T)."""
        hidden_states = hidden_states + self.attention(self.attention_norm(hidden_states), rotary, mask, cache)
        normed = self.ffn_norm(hidden_states)
        if self.shared_expert is not None:
            hidden_states = hidden_states + self.shared_expert(normed)
        if self.router is None:
            return hidden_states
        chosen, experts = self.router(normed).topk(self.top_k, dim=-1)  # (B, T, K)
        weights = chosen.softmax(dim=-1) * (experts < self.num_experts)  # a null expert, the last, adds nothing
        experts = experts.clamp(max=self.num_experts - 1)
        mixed = self.hidden_experts(normed, weights, experts) if rows is None else mix(*rows, weights, experts)
        return hidden_states + mixed.to(hidden_states.dtype)


def mix(rows: Tensor, inverse: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """Return the sum (B, T, D) of vectors (U, E, D): each token's `experts` (B, T, K), times their `weights`."""
    index = inverse.unsqueeze(-1) * rows.shape[1] + experts  # (B, T, K)
    table = rows.flatten(0, 1).to(weights.dtype)  # (U * E, D)
    summed = F.embedding_bag(index.flatten(0, 1), table, per_sample_weights=weights.flatten(0, 1), mode="sum")
    return summed.view(*inverse.shape, -1)


def find_table(model: str, options: dict[str, Any]) -> Path:
    """Return the folder of a model's table: of a folder as it is, of a model of the hub after a download."""
    subfolder = Path(options.get("subfolder") or "", "lut")
    if Path(model).is_dir():
        return Path(model) / subfolder
    from huggingface_hub import snapshot_download  # which transformers downloads with, too

    names = ("revision", "cache_dir", "token", "local_files_only", "force_download")
    wanted: dict[str, Any] = {name: options[name] for name in names if options.get(name) is not None}
    return Path(snapshot_download(model, allow_patterns=f"{subfolder.as_posix()}/*", **wanted)) / subfolder


class MoleForCausalLM(PreTrainedModel, GenerationMixin):
    """A decoder with a vocabulary head. `from_pretrained(..., lut_in_memory=True)` keeps the table in memory."""

    config_class = MoleConfig
    config: MoleConfig
    _no_split_modules = ["MoleBlock"]  # noqa: RUF012 - as transformers declares it
    _tied_weights_keys = {"head.weight": "embedding.weight"}  # noqa: RUF012
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["router"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: MoleConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(MoleBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.expert_ids == "seen":  # the ids that have a row; the table knows them, too
            self.register_buffer("has_row", torch.zeros(config.vocab_size, dtype=torch.bool))
        self.table: LookupTable | None = None
        """None where the experts are weights, and in a model that was not loaded from a folder."""
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, lut_in_memory: bool = False, **kwargs: Any
    ) -> Any:
        """Load weights as any model of transformers, and open the table in `lut/`, of a folder or of a hub's model."""
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.config.has_table and pretrained_model_name_or_path is not None:
            model.open_table(find_table(model.name_or_path, kwargs), lut_in_memory)
        return loaded

    def open_table(self, folder: str | os.PathLike[str], in_memory: bool = False) -> None:
        """Read rows from the table in a folder from now on; ValueError where it belongs to another model."""
        table, config = LookupTable(folder, in_memory), self.config
        sizes = (len(config.mixture_layers), config.num_experts, config.hidden_size)
        if (table.vocab_size, *table.sizes) != (config.vocab_size, *sizes):
            raise ValueError(f"{table.folder}: its sizes are not those of config.json; copy the table of this model")
        if table.manifest["backbone"] != config.backbone:
            raise ValueError(f"{table.folder}: belongs to other weights than config.json says; copy this model's table")
        self.table = table

    def save_pretrained(self, save_directory: Any, *args: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save weights, configuration and code as any model of transformers, and the table."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.table is not None and kwargs.get("is_main_process", True):
            self.table.save(Path(save_directory) / "lut")
        if push_to_hub:  # it saves into a folder of its own, by this method
            self.push_to_hub(kwargs.get("repo_id", Path(save_directory).name), token=kwargs.get("token"))

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        per_layer_inputs: Tensor | None = None,
        cache: Any | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return next-token logits (B, T, V), and the mean loss where there are labels (B, T).

        Arguments are those of any decoder in transformers; `cache` is what newer releases call `past_key_values`.
        `per_layer_inputs` (B, T, L, E * D) are what the experts return for these tokens, of layers that have some: rows
        of the table that were read elsewhere, in place of those that would be read here.
        """
        cache = past_key_values if cache is None else cache
        use_cache = self.config.use_cache if use_cache is None else use_cache
        logits_to_keep = kwargs.pop("num_logits_to_keep", logits_to_keep)  # as older releases call it
        tokens = self._checked(input_ids, inputs_embeds, per_layer_inputs)
        pieces = self._pieces(input_ids, tokens.shape[1]) if per_layer_inputs is None else [slice(0, tokens.shape[1])]
        if cache is None and (use_cache or len(pieces) > 1):
            cache = DynamicCache()
        start = 0 if cache is None else int(cache.get_seq_length())
        if position_ids is None:
            position_ids = token_positions(attention_mask, start, tokens)
        states, layers = list[list[Tensor]](), self.config.mixture_layers
        for piece in pieces:
            rows = self._rows(tokens[:, piece], None if per_layer_inputs is None else per_layer_inputs[:, piece])
            embeddings = self.embedding(tokens[:, piece]) if inputs_embeds is None else inputs_embeds[:, piece]
            mask = visible_tokens(attention_mask, start, piece, embeddings.device)
            rotary = rotary_table(position_ids[:, piece].to(embeddings.device), self.config, embeddings.dtype)
            entered: list[Tensor] = []
            for layer, block in enumerate(self.blocks):
                entered += [embeddings] if output_hidden_states else []
                of_layer = None if rows is None or layer not in layers else rows(layers.index(layer))
                embeddings = block(embeddings, rotary, mask, cache, of_layer)
            states.append([*entered, self.norm(embeddings)])
        hidden_states = [torch.cat(parts, dim=1) for parts in zip(*states, strict=True)]  # L + 1 or 1 of (B, T, D)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(hidden_states[-1][:, kept])  # (B, T, V)
        loss_of: Any = self.loss_function
        values = {"logits": logits, "labels": labels, "vocab_size": self.config.vocab_size}
        loss = None if labels is None else loss_of(**values, **kwargs)
        every: Any = tuple(hidden_states) if output_hidden_states else None
        output = CausalLMOutputWithPast(loss, logits, cache if use_cache else None, every)
        return output.to_tuple() if return_dict is False else output

    def _checked(self, input_ids: Tensor | None, embeddings: Tensor | None, given_rows: Tensor | None) -> Tensor:
        """Return the ids (B, T), or the embeddings (B, T, D) in their place; ValueError where inputs are missing."""
        if (input_ids is None) == (embeddings is None):
            raise ValueError("give either input_ids or inputs_embeds")
        tokens, config = embeddings if input_ids is None else input_ids, self.config
        assert tokens is not None
        expected = (*tokens.shape[:2], len(config.mixture_layers), config.num_experts * config.hidden_size)
        if given_rows is not None and not (config.has_table and given_rows.shape == expected):
            wanted = f"(B, T, L, E * D) = {expected}" if config.has_table else "none: this model has no table"
            raise ValueError(f"per_layer_inputs has shape {tuple(given_rows.shape)}, expected {wanted}")
        if config.has_table and given_rows is None and (self.table is None or input_ids is None):
            missing = "input_ids" if self.table is not None else "a table: load it by from_pretrained or open_table"
            raise ValueError(f"the experts' rows need {missing}; or give per_layer_inputs")
        return tokens

    def _pieces(self, input_ids: Tensor | None, length: int) -> list[slice]:
        """Cut tokens into parts whose distinct ids have at most `CHUNK_BYTES` of rows; one part under autograd."""
        if self.table is None or input_ids is None or torch.is_grad_enabled():
            return [slice(0, length)]
        pieces: list[slice] = []
        start, most = 0, max(1, CHUNK_BYTES // self.table.row_bytes)
        while start < length:
            count = length - start
            while count > 1 and len(input_ids[:, start : start + count].unique()) > most:
                count = (count + 1) // 2
            pieces.append(slice(start, start + count))
            start += count
        return pieces

    def _rows(self, tokens: Tensor, given: Tensor | None) -> Callable[[int], tuple[Tensor, Tensor]] | None:
        """Return a function from a layer to its experts' vectors (U, E, D), and which of them each token has (B, T)."""
        if given is not None:
            inverse = torch.arange(given.shape[:2].numel(), device=given.device).view(given.shape[:2])
            return lambda layer: (given[:, :, layer].reshape(inverse.numel(), self.config.num_experts, -1), inverse)
        if self.table is None:
            return None
        table, (ids, inverse) = self.table, tokens.cpu().unique(return_inverse=True)
        stored, places = table.read(ids.tolist()).to(tokens.device), inverse.to(tokens.device)  # (U, row_bytes), (B, T)
        return lambda layer: (table.layer(stored, layer), places)  # pyright: ignore[reportUnknownLambdaType]
