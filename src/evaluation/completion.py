"""Texts that a model writes after prompts, up to stop strings: tasks that read answers are scored by them.

B batch, T prompt tokens.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple, cast

from src.data.tokenizer import num_ids
from src.evaluation.likelihood import TextModel
from src.evaluation.perplexity import Share
from src.inference.generation import Sampling, left_pad, stream
from src.model import Transformer
from src.model.sharding import is_sharded


@dataclass(frozen=True, kw_only=True)
class Stopping:
    """How texts are written, and where they end."""

    until: tuple[str, ...]
    """Texts end in front of the first of these."""
    max_new_tokens: int
    """Tokens of a text at most; a context that has no room for them gives half of itself."""
    sampling: Sampling


class Prompt(NamedTuple):
    """What a text begins with, and how it goes on."""

    text: str
    stopping: Stopping


def complete(model: TextModel, prompts: Sequence[Prompt], description: str) -> list[str]:
    """Return the text that the model writes after each prompt, without the stop string.

    Prompts of similar length are computed together, with padding on the left. Of a prompt that is too long the end is
    read.
    """
    encoded = [_encode(model, prompt) for prompt in prompts]
    batches = _batches(model, prompts, encoded)
    # Ranks that share out the parameters must make the same passes, and how many there are depends on the texts.
    share = Share() if is_sharded(cast(Transformer, model.model)) else model.share
    with model.progress(f"{description} (batches)", len(batches)) as advance:
        written = share.map(
            lambda batch: _write(model, [encoded[index] for index in batch], prompts[batch[0]].stopping, batch[0]),
            batches,
            advance,
        )
    texts = {
        index: text
        for batch, found in zip(batches, written, strict=True)
        for index, text in zip(batch, found, strict=True)
    }
    return [texts[index] for index in range(len(prompts))]


def new_tokens(model: TextModel, stopping: Stopping) -> int:
    """Return how many tokens a text may have."""
    limit = model.max_length
    return stopping.max_new_tokens if stopping.max_new_tokens < limit else limit // 2


def _encode(model: TextModel, prompt: Prompt) -> list[int]:
    ids = model.prompt(prompt.text) or [model.start_of_text]
    return ids[-(model.max_length - new_tokens(model, prompt.stopping)) :]


def _batches(model: TextModel, prompts: Sequence[Prompt], encoded: Sequence[Sequence[int]]) -> list[list[int]]:
    """Group indices of prompts that stop alike, longest first, so that running out of memory shows at once."""
    kinds = list(dict.fromkeys(prompt.stopping for prompt in prompts))
    batches: list[list[int]] = []
    for kind in kinds:
        indices = [index for index, prompt in enumerate(prompts) if prompt.stopping == kind]
        indices.sort(key=lambda index: -len(encoded[index]))
        while indices:
            rows = max(1, model.batch_tokens // (len(encoded[indices[0]]) + new_tokens(model, kind)))
            batches.append(indices[:rows])
            del indices[:rows]
    return batches


def _write(model: TextModel, prompts: Sequence[Sequence[int]], stopping: Stopping, number: int) -> list[str]:
    """Continue prompts of token ids; the number of the first one decides what is drawn."""
    token_ids, mask = left_pad(prompts)  # (B, T)
    sampling = replace(stopping.sampling, seed=number, num_ids=num_ids(model.rule.tokenizer))
    steps = stream(
        cast(Transformer, model.model),
        token_ids,
        max_new_tokens=new_tokens(model, stopping),
        attention_mask=mask,
        stop_ids=model.rule.stop_ids,
        **asdict(sampling),
    )
    written: list[list[int]] = [[] for _ in prompts]
    going_on = set(range(len(prompts)))
    for step in steps:
        for row, token_id in enumerate(step.tolist()):
            if row in going_on:
                written[row].append(token_id)
        going_on = {row for row in going_on if not _has_ended(model, written[row], stopping.until)}
        if not going_on:
            break
    return [_cut(model.tokenizer.decode(ids), stopping.until) for ids in written]


def _has_ended(model: TextModel, ids: Sequence[int], until: Sequence[str]) -> bool:
    if ids[-1] in model.rule.stop_ids:
        return True
    longest = max((len(stop.encode()) for stop in until), default=0)
    tail = model.tokenizer.decode(ids[-(longest + 2) :]) if longest else ""  # each token adds a byte or more
    return any(stop in tail for stop in until if stop)


def _cut(text: str, until: Sequence[str]) -> str:
    """Return what stands in front of the first stop string."""
    return text[: min([text.index(stop) for stop in until if stop and stop in text], default=len(text))]
