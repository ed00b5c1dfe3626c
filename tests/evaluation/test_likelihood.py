"""Log-likelihoods against plain loops, and work shared by ranks."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, ClassVar

import pytest
import torch
from tokenizers import Tokenizer

from src.data.text_rule import training_rule
from src.data.tokenizer import train_bpe
from src.evaluation import likelihood
from src.evaluation.likelihood import Request, TextModel
from src.evaluation.perplexity import Share
from src.model import Transformer
from tests.model.models import MOLE, build

REQUESTS = [
    Request([1, 2, 3], [4, 5]),
    Request([7], [8]),
    Request([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [11, 12, 1]),
    Request([3, 3], [3, 3, 3]),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(iter(["the cat sat on the mat and the dog sat on the log"] * 20), 300)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build(MOLE, torch.float32).eval()


def text_model(
    model: Transformer, tokenizer: Tokenizer, *, batch_tokens: int = 16, share: Share | None = None
) -> TextModel:
    return TextModel(
        model, training_rule(tokenizer, "BPE"), max_length=8, batch_tokens=batch_tokens, share=share or Share()
    )


def by_hand(model: Transformer, request: Request, max_length: int) -> tuple[float, bool]:
    total, greedy = 0.0, True
    ids = [*request.context, *request.continuation]
    for position in range(len(request.context), len(ids)):
        last = len(ids) - 1
        seen = ids[max(0, last - max_length) : position]  # the start is cut as for the whole request
        log_probs = model(torch.tensor([seen]))[0, -1].log_softmax(-1)
        total += log_probs[ids[position]].item()
        greedy &= int(log_probs.argmax()) == ids[position]
    return total, greedy


@pytest.mark.parametrize("batch_tokens", [1, 16, 1000])
def test_they_are_sums_over_the_continuation_in_the_order_asked(
    model: Transformer, tokenizer: Tokenizer, batch_tokens: int
) -> None:
    found = text_model(model, tokenizer, batch_tokens=batch_tokens).log_likelihoods(REQUESTS, "")
    for request, scored in zip(REQUESTS, found, strict=True):
        expected, greedy = by_hand(model, request, 8)
        assert scored.log_likelihood == pytest.approx(expected, abs=1e-5)
        assert scored.is_greedy == greedy


def test_what_a_model_prefers_is_greedy_and_its_gap_is_that_of_the_two_best(
    model: Transformer, tokenizer: Tokenizer
) -> None:
    logits = model(torch.tensor([[1, 2, 3]]))[0, -1].detach()
    best = logits.topk(2).values
    (found,) = text_model(model, tokenizer).log_likelihoods([Request([1, 2, 3], [int(logits.argmax())])], "")
    assert found.is_greedy
    assert found.gap == pytest.approx(float(best[0] - best[1]), abs=1e-5)
    first = int(logits.argmax())
    after = model(torch.tensor([[1, 2, 3, first]]))[0, -1].detach()
    likely, unlikely = int(after.argmax()), int(after.argmin())
    both, one = text_model(model, tokenizer).log_likelihoods(
        [Request([1, 2, 3], [first, likely]), Request([1, 2, 3], [first, unlikely])], ""
    )
    assert both.is_greedy
    assert not one.is_greedy


def test_only_positions_that_are_scored_get_logits_and_few_at_a_time(
    model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = text_model(model, tokenizer, batch_tokens=1000).log_likelihoods(REQUESTS, "")
    monkeypatch.setattr(likelihood, "HEAD_POSITIONS", 4)
    shapes: list[torch.Size] = []

    def record(_module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        shapes.append(inputs[0].shape)

    with model.head.register_forward_pre_hook(record):
        found = text_model(model, tokenizer, batch_tokens=1000).log_likelihoods(REQUESTS, "")
    assert shapes == [(4, 8), (4, 8), (1, 8)]  # 3 + 2 + 3 + 1 continuation tokens; the context would be 13 more
    for one, other in zip(found, whole, strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-5)
        assert one.is_greedy == other.is_greedy


def test_a_pair_is_cut_as_running_text_is(model: Transformer, tokenizer: Tokenizer) -> None:
    texts = text_model(model, tokenizer)
    for context, continuation in (("the cat", " sat"), ("the cat ", "sat"), ("the c", "at sat")):
        request = texts.encode_pair(context, continuation)
        assert request.continuation
        assert tokenizer.decode([*request.context, *request.continuation]) == context + continuation
    assert texts.encode_pair("the cat ", "sat") == texts.encode_pair("the cat", " sat")
    assert texts.encode_pair("", "the cat").context == [tokenizer.token_to_id("<|endoftext|>")]


class _Recorded(Share):
    """A share that computes nothing of the other ranks."""

    def map(self, compute: Any, batches: Sequence[Any], advance: Any = None) -> list[Any]:
        self.batches.append(list(batches))
        return [compute(batch) for batch in batches]

    @property
    def batches(self) -> list[list[Any]]:
        return self.__dict__.setdefault("seen", [])


def test_batches_do_not_depend_on_ranks(model: Transformer, tokenizer: Tokenizer) -> None:
    shares = _Recorded(0, 1), _Recorded(1, 2)
    for share in shares:
        text_model(model, tokenizer, share=share).log_likelihoods(REQUESTS, "")
    assert shares[0].batches == shares[1].batches


class _InTurn(Share):
    """Two ranks in one process: what a rank computed stays in `parts` for those that come after it."""

    parts: ClassVar[list[dict[int, Any]]] = []

    def _gathered(self, own: dict[int, Any]) -> list[dict[int, Any]]:
        self.parts.append(own)
        return self.parts


@pytest.mark.parametrize("count", [1, 2, 5])
def test_ranks_compute_equally_often_and_all_get_everything(count: int) -> None:
    _InTurn.parts.clear()
    calls: list[list[int]] = [[], []]
    advanced: list[int] = []

    def run(rank: int) -> list[int]:
        def compute(batch: int) -> int:
            calls[rank].append(batch)
            return batch * batch

        return _InTurn(rank, 2).map(compute, range(count), advanced.append)

    with suppress(KeyError):  # what the other rank computes is not there yet
        run(0)
    assert run(1) == [index * index for index in range(count)]
    assert len(calls[0]) == len(calls[1])
    assert set(calls[0]) | set(calls[1]) == set(range(count))
    assert sum(advanced) == 2 * count


def test_an_empty_continuation_is_certain(model: Transformer, tokenizer: Tokenizer) -> None:
    scorer = text_model(model, tokenizer)
    (alone,) = scorer.log_likelihoods([Request([5], [])], "")
    assert (alone.log_likelihood, alone.is_greedy) == (0.0, True)
    between = scorer.log_likelihoods([REQUESTS[0], Request([1, 2], []), REQUESTS[2]], "")
    assert between[1] == alone
    assert [between[0], between[2]] == scorer.log_likelihoods([REQUESTS[0], REQUESTS[2]], "")
    assert scorer.log_likelihoods([Request([], [])], "") == [alone]
