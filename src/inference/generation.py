"""Autoregressive generation over token ids. Knows no text: a tokenizer is the caller's.

B batch, T prompt tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from src.model import KeyValueCache, Transformer

PREFILL_CHUNK_TOKENS = 512
"""Prompt tokens per forward pass, so that the memory of a long prompt stays bounded."""


def generate(
    model: Transformer,
    token_ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Sequence[int] = (),
    seed: int | None = None,
) -> Tensor:
    """Continue `token_ids` (B, T) int64 and return (B, T + new); see `stream` for the arguments."""
    steps = stream(
        model,
        token_ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_ids=stop_ids,
        seed=seed,
    )
    return torch.cat([token_ids, *(step.unsqueeze(1) for step in steps)], dim=1)


@torch.no_grad()
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
) -> Iterator[Tensor]:
    """Yield the next token ids (B,) one step at a time.

    Args:
        model: either form, in eval mode.
        token_ids: prompts of one length, (B, T) int64 with T >= 1.
        max_new_tokens: steps at most.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: sample among the k most likely ids only.
        top_p: sample among the most likely ids that together reach this probability.
        stop_ids: a sequence that produced one of these repeats it; all of them stopped ends the generation.
        seed: makes sampling repeatable; None draws from torch's global generator.

    Raises:
        ValueError: the prompt is empty, or prompt and new tokens exceed the model's `max_sequence_length`.
    """
    batch_size, prompt_tokens = token_ids.shape
    limit = model.config.max_sequence_length
    if not prompt_tokens:
        raise ValueError("the prompt is empty; give at least one token")
    if prompt_tokens + max_new_tokens > limit:
        raise ValueError(
            f"prompt ({prompt_tokens} tokens) and max_new_tokens ({max_new_tokens}) exceed the model's "
            f"max_sequence_length ({limit}); shorten one of them"
        )
    generator = None if seed is None else torch.Generator(token_ids.device).manual_seed(seed)
    cache = KeyValueCache(
        model.config,
        batch_size,
        prompt_tokens + max_new_tokens,
        device=token_ids.device,
        dtype=model.head.weight.dtype,
    )
    stops = torch.tensor(list(stop_ids), dtype=torch.int64, device=token_ids.device)
    stopped = torch.zeros(batch_size, dtype=torch.bool, device=token_ids.device)
    hidden_states = _prefill(model, token_ids, cache)
    next_ids = token_ids[:, -1]
    for step in range(max_new_tokens):
        sampled = sample(model.head(hidden_states[:, -1]), temperature, top_k, top_p, generator)  # (B,)
        next_ids = torch.where(stopped, next_ids, sampled)
        stopped = stopped | torch.isin(next_ids, stops)
        if model.experts is not None and step + 1 < max_new_tokens and not stopped.all():
            model.experts.prefetch(next_ids.unique())
        yield next_ids
        if stopped.all() or step + 1 == max_new_tokens:
            return
        hidden_states = model.hidden_states(next_ids.unsqueeze(1), cache=cache)


def _prefill(model: Transformer, token_ids: Tensor, cache: KeyValueCache) -> Tensor:
    chunks = token_ids.split(PREFILL_CHUNK_TOKENS, dim=1)
    for chunk in chunks[:-1]:
        model.hidden_states(chunk, cache=cache)
    return model.hidden_states(chunks[-1], cache=cache)


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """Draw ids (B,) from logits (B, V); temperature 0 takes the largest."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p is not None:
        ranked, order = logits.sort(dim=-1, descending=True)
        probs = ranked.softmax(dim=-1)
        beyond = probs.cumsum(dim=-1) - probs >= top_p  # the most likely id always stays
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(-1)
