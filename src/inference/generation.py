"""Autoregressive generation over token ids: sampling, prompts, and one step after another. Knows no text.

B batch, T prompt tokens, S all tokens so far, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, Unpack

import torch
from torch import Tensor

from src.model import KeyValueCache, Transformer

GREEDY_BELOW = 1e-6
"""Temperatures at which logits that differ by rounding error are no longer drawn alike; smaller ones overflow."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 0.0
    """Below `GREEDY_BELOW` the most likely id is taken; otherwise logits are divided by it."""
    top_k: int | None = None
    """Draw among the k most likely ids only."""
    top_p: float | None = None
    """Draw among the most likely ids that together reach this probability, in (0, 1]."""
    seed: int | None = None
    """Makes drawing repeatable: row i of a batch draws as a batch of its own with seed + i would."""
    num_ids: int | None = None
    """Take ids below this only: a model may have more ids than its tokenizer, which cannot decode the others."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}, but it must be finite and at least 0; 0 is greedy")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}, but it must be at least 1; leave it out to draw among all ids")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, but it must be in (0, 1]; leave it out to draw among all ids")
        if self.num_ids is not None and self.num_ids < 1:
            raise ValueError(f"num_ids is {self.num_ids}, but it must be at least 1; leave it out to take all ids")


class Sampler:
    """Draws ids for a batch; every row has a random generator of its own, so its neighbors do not matter."""

    def __init__(self, sampling: Sampling, batch_size: int) -> None:
        """Seed a generator per row; without a seed, from torch's global generator."""
        self._sampling = sampling
        seeds = (
            torch.randint(2**62, (batch_size,)) if sampling.seed is None else sampling.seed + torch.arange(batch_size)
        )
        self._greedy = sampling.temperature < GREEDY_BELOW
        self._generators = [] if self._greedy else [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    def __call__(self, logits: Tensor) -> Tensor:
        """Draw ids (B,) from logits (B, V); the ids are on the CPU, wherever the logits are.

        That is the only wait for a device. The draw itself is made on the CPU: CUDA has no deterministic `cumsum`.
        """
        if self._sampling.num_ids is not None:
            logits = logits[:, : self._sampling.num_ids]
        if self._greedy:
            return logits.max(dim=-1).indices.cpu()  # the first of equals, as argmax, in a quarter of a CPU's time
        probs = truncated_probs(logits.cpu(), self._sampling)  # (B, V)
        cumulative = probs.double().cumsum(dim=-1)  # (B, V)
        uniform = torch.stack(
            [torch.rand(1, generator=generator, dtype=torch.float64) for generator in self._generators]
        )
        targets = uniform * cumulative[:, -1:]  # (B, 1)
        drawn = torch.searchsorted(cumulative, targets, right=True).squeeze(1)  # (B,): never an id of probability 0
        return drawn.clamp(max=logits.shape[-1] - 1)


def truncated_probs(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the probabilities (B, V) float32 that are drawn from; ids cut off by top-k or top-p have 0."""
    logits = logits.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        threshold = logits.topk(sampling.top_k, dim=-1).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if sampling.top_p is not None:
        ranked, order = logits.sort(dim=-1, descending=True)
        probs = ranked.softmax(dim=-1)
        beyond = probs.cumsum(dim=-1) - probs >= sampling.top_p  # the most likely id always stays
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return logits.softmax(dim=-1)


PREFILL_CHUNK_TOKENS = 512
"""Prompt tokens per forward pass, so that the memory of a long prompt stays bounded."""
PREFILL_CHUNK_POSITIONS = 4096
"""The same over all sequences of a batch."""


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask, both (B, T), of prompts of different lengths: padding goes on the left."""
    if not all(prompts):
        raise ValueError(
            f"prompt {[bool(prompt) for prompt in prompts].index(False)} is empty; give at least one token"
        )
    longest = max(len(prompt) for prompt in prompts)
    token_ids = torch.tensor([[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    return token_ids, torch.arange(longest) >= longest - lengths.unsqueeze(1)


class Options(TypedDict, total=False):
    """What `stream` and `generate` may be given."""

    temperature: float
    top_k: int | None
    top_p: float | None
    stop_ids: Sequence[int]
    seed: int | None
    num_ids: int | None
    attention_mask: Tensor | None
    overflow: Literal["refuse", "window"]
    prefill_chunk_tokens: int


def generate(model: Transformer, token_ids: Tensor, *, max_new_tokens: int, **options: Unpack[Options]) -> Tensor:
    """Continue `token_ids` (B, T) int64 and return (B, T + new); arguments as in `stream`."""
    steps = stream(model, token_ids, max_new_tokens=max_new_tokens, **options)
    return torch.cat([token_ids, *(step.unsqueeze(1) for step in steps)], dim=1)


def stream(
    model: Transformer,
    token_ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Sequence[int] = (),
    seed: int | None = None,
    num_ids: int | None = None,
    attention_mask: Tensor | None = None,
    overflow: Literal["refuse", "window"] = "refuse",
    prefill_chunk_tokens: int = PREFILL_CHUNK_TOKENS,
) -> Iterator[Tensor]:
    """Yield the next token ids (B,) after prompts (B, T) int64, one step at a time; `model` is in eval mode.

    The prompts may be on any device; the ids are on the same one.

    `temperature`, `top_k`, `top_p`, `seed` and `num_ids` are those of `Sampling`. A sequence that produced one of
    `stop_ids` repeats it; all of them stopped ends the generation. `attention_mask` (B, T) is False where a prompt is
    padding (see `left_pad`). A prompt that leaves no room in the model's context for `max_new_tokens` is refused, or
    with `overflow` `window` only its last tokens are read. The prompt is fed `prefill_chunk_tokens` at a time, fewer
    when the batch is large. ValueError when an argument is out of range.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, num_ids=num_ids)
    token_ids, mask = _fit(model, token_ids, attention_mask, max_new_tokens, overflow)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, but it must not be negative")
    if prefill_chunk_tokens < 1:
        raise ValueError(f"prefill_chunk_tokens is {prefill_chunk_tokens}, but it must be at least 1")
    chunk_tokens = max(1, min(prefill_chunk_tokens, PREFILL_CHUNK_POSITIONS // len(token_ids)))
    return _steps(model, token_ids, mask, max_new_tokens, sampling, stop_ids, chunk_tokens)


def _steps(
    model: Transformer,
    token_ids: Tensor,
    mask: Tensor | None,
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Sequence[int],
    chunk_tokens: int,
) -> Iterator[Tensor]:
    # Yields outside of inference mode: closing a generator that is suspended inside would have to leave the mode, which
    # fails at interpreter exit, and the ids would be inference tensors.
    if not max_new_tokens:
        return
    batch_size, prompt_tokens = token_ids.shape
    device, dtype = model.embedding.weight.device, model.head.weight.dtype
    with torch.inference_mode():
        cache = KeyValueCache(model.config, batch_size, prompt_tokens + max_new_tokens, device=device, dtype=dtype)
        if mask is not None:  # new tokens are never padding
            mask = torch.cat([mask, mask.new_ones(batch_size, max_new_tokens)], dim=1).to(device)
        # Ids stay on the CPU, where the disk needs them; a step then waits for the device once, in the sampler.
        prompt = token_ids.cpu()
        stops = torch.tensor(list(stop_ids), dtype=torch.int64)
        stopped = torch.zeros(batch_size, dtype=torch.bool)
        hidden_states, next_ids = prefill(model, prompt, cache, mask, chunk_tokens), prompt[:, -1]
    sampler = Sampler(sampling, batch_size)
    for step in range(1, max_new_tokens + 1):
        with torch.inference_mode():
            sampled = sampler(model.head(hidden_states[:, -1]))  # (B,)
            next_ids = torch.where(stopped, next_ids, sampled)
            stopped = stopped | torch.isin(next_ids, stops)
            last = step == max_new_tokens or bool(stopped.all())
            new_ids = next_ids.unsqueeze(1)  # (B, 1)
            expert_rows = None if last else model.expert_rows(new_ids)  # the disk works while the caller has the ids
        yield next_ids.to(token_ids.device, copy=True, non_blocking=True)
        if last:
            return
        with torch.inference_mode():
            visible = None if mask is None else mask[:, : cache.span(1)]
            trunk = model.trunk(new_ids, cache=cache, attention_mask=visible, expert_rows=expert_rows)
            hidden_states = trunk.hidden_states


def prefill(
    model: Transformer, token_ids: Tensor, cache: KeyValueCache, mask: Tensor | None, chunk_tokens: int
) -> Tensor:
    """Feed a prompt (B, T) to the cache chunk by chunk; return the last chunk's hidden states (B, T', D).

    Each chunk's rows are requested before the chunk in front of it is computed.
    """
    chunks = token_ids.split(chunk_tokens, dim=1)
    hidden_states, upcoming = token_ids.new_empty(0), model.expert_rows(chunks[0])
    for index, chunk in enumerate(chunks, start=1):
        expert_rows, upcoming = upcoming, model.expert_rows(chunks[index]) if index < len(chunks) else None
        visible = None if mask is None else mask[:, : cache.span(chunk.shape[1])]
        trunk = model.trunk(chunk, cache=cache, attention_mask=visible, expert_rows=expert_rows)
        hidden_states = trunk.hidden_states
    return hidden_states


def _fit(
    model: Transformer,
    token_ids: Tensor,
    attention_mask: Tensor | None,
    max_new_tokens: int,
    overflow: Literal["refuse", "window"],
) -> tuple[Tensor, Tensor | None]:
    """Check prompts and mask, and cut what the context cannot hold; a mask that hides nothing becomes None."""
    prompt_tokens, limit = token_ids.shape[1], model.config.max_sequence_length
    if not prompt_tokens:
        raise ValueError("the prompt is empty; give at least one token")
    if attention_mask is not None and (attention_mask.shape != token_ids.shape or not attention_mask[:, -1].all()):
        raise ValueError("attention_mask must have the shape of token_ids and be True in its last column: pad left")
    if prompt_tokens + max_new_tokens > limit and (overflow == "refuse" or max_new_tokens >= limit):
        raise ValueError(
            f"prompt ({prompt_tokens} tokens) and max_new_tokens ({max_new_tokens}) exceed the model's "
            f"max_sequence_length ({limit}); shorten one of them, or read only the prompt's end with overflow='window'"
        )
    kept = slice(max(0, prompt_tokens + max_new_tokens - limit), None)
    mask = None if attention_mask is None else attention_mask[:, kept].bool()
    return token_ids[:, kept], None if mask is None or bool(mask.all()) else mask
