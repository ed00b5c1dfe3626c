"""Log-likelihoods of continuations, by which every task is scored, for any causal language model.

Logits are made for scored positions only, and for few of them at a time. B batch, T tokens, C continuation tokens,
N scored positions, D hidden, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor

from src.data.text_rule import TextRule
from src.evaluation.perplexity import Share
from src.system.console import Progress, no_progress

HEAD_POSITIONS = 512
"""Positions that have logits at a time."""


class CausalModel(Protocol):
    """A decoder whose vocabulary head can be applied to some positions only, such as `Transformer`."""

    @property
    def head(self) -> Callable[[Tensor], Tensor]:
        """Maps hidden states (N, D) to next-token logits (N, V)."""
        ...

    def hidden_states(self, token_ids: Tensor, /) -> Tensor:
        """Return (B, T, D) for token ids (B, T) int64; each position sees earlier ones only."""
        ...


class Request(NamedTuple):
    """A continuation to score after its context, both as token ids."""

    context: Sequence[int]
    continuation: Sequence[int]


class Likelihood(NamedTuple):
    """How likely a model finds a continuation."""

    log_likelihood: float
    """Nats, summed over its tokens."""
    is_greedy: bool
    """Whether each of its tokens is the most likely one."""
    gap: float
    """Smallest gap between the two best logits at any of its tokens; where it is rounding error, so is `is_greedy`."""


NOTHING_TO_SCORE = Likelihood(0.0, is_greedy=True, gap=math.inf)
"""Of an empty continuation, which every text begins with."""


class TextModel:
    """A model and the rule by which it sees text: all that a task needs to know."""

    def __init__(
        self,
        model: CausalModel,
        rule: TextRule,
        *,
        max_length: int,
        device: torch.device | str = "cpu",
        batch_tokens: int = 4096,
        share: Share = Share(),  # noqa: B008 - frozen
        progress: Progress = no_progress,
    ) -> None:
        """Run `model` on up to `batch_tokens` tokens at a time, sequences of up to `max_length` tokens."""
        self.model, self.rule, self.max_length, self.device = model, rule, max_length, device
        self.batch_tokens, self.share, self.progress = batch_tokens, share, progress

    @property
    def tokenizer(self) -> Tokenizer:
        """Turns ids back into text."""
        return self.rule.plain

    @property
    def end_of_text(self) -> int:
        """The id that ends texts."""
        return self.rule.separator

    @property
    def start_of_text(self) -> int:
        """The id that stands in front of a text without context: the end of another where the rule has none."""
        return self.rule.before[-1] if self.rule.before else self.rule.separator

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text alone."""
        return self.rule.encode(text)

    def prompt(self, text: str) -> list[int]:
        """Return the ids of a text that is continued."""
        return self.rule.prompt(text)

    def encode_pair(self, context: str, continuation: str) -> Request:
        """Return a request whose boundary falls where the context's own ids end, as lm-eval does it.

        Spaces at the end of the context belong to the continuation, and both are encoded together, so that a word is
        cut as in running text.
        """
        spaces = len(context) - len(context.rstrip())
        context, continuation = context[: len(context) - spaces], context[len(context) - spaces :] + continuation
        if not context:
            return Request(self.rule.before or [self.start_of_text], self.encode(continuation))
        context_ids = self.prompt(context)
        rest = self.prompt(context + continuation)[len(context_ids) :]
        return Request(context_ids, rest or self.encode(continuation))

    @torch.no_grad()
    def log_likelihoods(self, requests: Sequence[Request], description: str) -> list[Likelihood]:
        """Score `requests` in batches of similar length, and return the results in the order of the requests."""
        batches = self._batches(requests)
        with self.progress(f"{description} (batches)", len(batches)) as advance:
            scored = self.share.map(lambda batch: self._score([requests[index] for index in batch]), batches, advance)
        results: dict[int, Likelihood] = {}
        for batch, likelihoods in zip(batches, scored, strict=True):
            results |= dict(zip(batch, likelihoods, strict=True))
        return [results.get(index, NOTHING_TO_SCORE) for index in range(len(requests))]

    def _batches(self, requests: Sequence[Request]) -> list[list[int]]:
        """Group indices of requests with a continuation, longest first, so that running out of memory shows at once."""
        lengths = [len(self._inputs(request)) for request in requests]
        batches: list[list[int]] = []
        room = 0
        scored = [index for index, request in enumerate(requests) if request.continuation]
        for index in sorted(scored, key=lambda index: -lengths[index]):
            if not room:
                batches.append([])
                room = max(1, self.batch_tokens // max(1, lengths[index]))
            batches[-1].append(index)
            room -= 1
        return batches

    def _inputs(self, request: Request) -> Sequence[int]:
        """Return the input ids: the last token is only predicted, and what exceeds the context is cut at the start."""
        return [*request.context, *request.continuation][-(self.max_length + 1) :][:-1]

    def _score(self, requests: Sequence[Request]) -> list[Likelihood]:
        inputs = [self._inputs(request) for request in requests]
        token_ids = torch.zeros(len(inputs), max(map(len, inputs)), dtype=torch.int64)  # (B, T), padded on the right
        for row, ids in enumerate(inputs):
            token_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        hidden_states = self.model.hidden_states(token_ids.to(self.device))  # (B, T, D)
        counts = [min(len(request.continuation), len(ids)) for request, ids in zip(requests, inputs, strict=True)]
        tails = [
            hidden_states[row, len(ids) - count : len(ids)]  # (C, D)
            for row, (ids, count) in enumerate(zip(inputs, counts, strict=True))
        ]
        targets = [
            torch.tensor(request.continuation[-count:], dtype=torch.int64)  # (C,)
            for request, count in zip(requests, counts, strict=True)
        ]
        scores = self._score_positions(torch.cat(tails), torch.cat(targets).to(self.device))  # (N, 3)
        return [
            Likelihood(float(log_probs.sum()), bool(greedy.all()), float(gaps.min()))
            for log_probs, greedy, gaps in (part.unbind(dim=1) for part in scores.split(counts))
        ]

    def _score_positions(self, hidden_states: Tensor, targets: Tensor) -> Tensor:
        """Return (N, 3) of hidden states (N, D): the target's log-probability, whether it is the likeliest, the gap."""
        parts: list[Tensor] = []
        for hidden, wanted in zip(hidden_states.split(HEAD_POSITIONS), targets.split(HEAD_POSITIONS), strict=True):
            logits = self.model.head(hidden)  # (HEAD_POSITIONS, V)
            log_probs = logits.log_softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
            best = logits.topk(2, dim=-1)
            greedy, gaps = best.indices[:, 0] == wanted, best.values[:, 0] - best.values[:, 1]
            parts.append(torch.stack([log_probs.gather(1, wanted.unsqueeze(1)).squeeze(1), greedy, gaps], dim=1).cpu())
        return torch.cat(parts)
