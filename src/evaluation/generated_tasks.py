"""Two small tasks made of held-out text, so that every run is scored on tasks without any data set.

They are scored through the same path as the published ones. Documents are text: models with other tokenizers get the
same ones.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from src.evaluation.held_out import HeldOut
from src.evaluation.likelihood import Likelihood, TextModel
from src.evaluation.results import TaskScore, fingerprint_documents

PASSAGE_TOKENS = 64
"""Tokens of a document of `next_passage`; its last quarter is what is asked for."""
CONTEXT_TOKENS = 64
"""Tokens in front of the word that `repeated_word` asks for."""
CHOICES = 4
_WORD = re.compile(r" [^\W\d]{4,}")


@dataclass(frozen=True)
class Document:
    """A context and one or several continuations, of which `target` is the true one."""

    context: str
    choices: tuple[str, ...]
    target: int


def next_passage(text: HeldOut, limit: int) -> list[Document]:
    """Which of four passages continues the text? The other three are from elsewhere in the held-out text."""
    size = min(PASSAGE_TOKENS, text.windows.shape[1])
    pieces = text.windows.unfold(1, size, size).reshape(-1, size)  # (N, size)
    head = size - max(1, size // 4)
    contexts = text.tokenizer.decode_batch(pieces[:, :head].tolist())
    passages = text.tokenizer.decode_batch(pieces[:, head:].tolist())
    draw = random.Random(0)
    order = draw.sample(range(len(passages)), len(passages))
    documents: list[Document] = []
    for index in order:
        others = _others(passages, index, draw)
        if len(documents) == limit:
            break
        if others is None or not contexts[index].strip():
            continue
        if not _is_plain("".join((contexts[index], passages[index], *others))):
            continue
        target = draw.randrange(CHOICES)
        documents.append(Document(contexts[index], (*others[:target], passages[index], *others[target:]), target))
    return documents


def repeated_word(text: HeldOut, limit: int) -> list[Document]:
    """Complete the text with a word that occurred earlier in it, in the manner of LAMBADA (arXiv:1606.06031)."""
    size = min(2 * CONTEXT_TOKENS, text.windows.shape[1])
    pieces = text.windows.unfold(1, size, size).reshape(-1, size)  # (N, size)
    draw = random.Random(0)
    documents: list[Document] = []
    for piece in draw.sample(text.tokenizer.decode_batch(pieces.tolist()), len(pieces)):
        candidates = list(_repetitions(piece))
        if len(documents) == limit:
            break
        if candidates and _is_plain(piece):
            context, word = draw.choice(candidates)
            documents.append(Document(context, (word,), 0))
    return documents


GENERATED: dict[str, Callable[[HeldOut, int], list[Document]]] = {
    "next_passage": next_passage,
    "repeated_word": repeated_word,
}
"""The tasks by name: each makes at most so many documents of held-out text."""


def score_documents(name: str, documents: Sequence[Document], model: TextModel) -> TaskScore:
    """Score the documents of one task."""
    requests = [model.encode_pair(document.context, choice) for document in documents for choice in document.choices]
    likelihoods = iter(model.log_likelihoods(requests, name))
    scored = [[next(likelihoods) for _ in document.choices] for document in documents]
    chooses = len(documents[0].choices) > 1
    answers = [_choice(found) if chooses else _completion(found[0]) for found in scored]
    hits = [
        float(answer == (document.target if chooses else 1))
        for (answer, _), document in zip(answers, documents, strict=True)
    ]
    truths = [found[document.target].log_likelihood for found, document in zip(scored, documents, strict=True)]
    return TaskScore(
        task=name,
        values={"acc": hits, "log_likelihood": truths},
        predictions=[answer for answer, _ in answers],
        gaps=[gap for _, gap in answers],
        fingerprint=fingerprint_documents(documents),
    )


def _choice(found: Sequence[Likelihood]) -> tuple[int, float]:
    """Return the choice with the highest log-likelihood, and by how much it won."""
    values = [likelihood.log_likelihood for likelihood in found]
    best, second = sorted(values, reverse=True)[:2]
    return values.index(best), best - second


def _completion(found: Likelihood) -> tuple[int, float]:
    return int(found.is_greedy), found.gap


def _others(passages: Sequence[str], index: int, draw: random.Random) -> list[str] | None:
    """Draw passages that differ from the true one and from each other; None where the text has too few."""
    others: list[str] = []
    for _ in range(8 * CHOICES):
        other = passages[draw.randrange(len(passages))]
        if other not in (passages[index], *others):
            others.append(other)
        if len(others) == CHOICES - 1:
            return others
    return None


def _repetitions(piece: str) -> Iterator[tuple[str, str]]:
    """Yield contexts and the words after them, in the second half of a piece, that the context holds already."""
    for match in _WORD.finditer(piece, len(piece) // 2):
        context = piece[: match.start()]
        if re.search(rf"\b{match.group().strip()}\b", context):
            yield context, match.group()


def _is_plain(text: str) -> bool:
    return "\N{REPLACEMENT CHARACTER}" not in text  # a character that was cut between two pieces
