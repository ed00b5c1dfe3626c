"""Routing and its losses against values worked out by hand."""

import math

import pytest
import torch
from torch import Tensor, nn

from src.model.router import Router, load_balance_loss, router_entropy, router_probs, z_loss

LN2 = math.log(2)


def logits(rows: list[list[float]]) -> Tensor:
    """One batch of tokens (1, T, E)."""
    return torch.tensor([rows], dtype=torch.float64)


def test_softmax_comes_after_the_choice() -> None:
    router = Router(3, 3, top_k=2).double()
    with torch.no_grad():
        router.weight.copy_(torch.eye(3))
    routing = router(logits([[0, 5 * LN2, 3 * LN2]]))
    assert routing.experts is not None and routing.experts.tolist() == [[[1, 2]]]
    assert routing.weights.tolist() == [[pytest.approx([4 / 5, 1 / 5])]]


def test_full_activation_is_a_softmax_over_all() -> None:
    router = Router(3, 3, top_k=None).double()
    with torch.no_grad():
        router.weight.copy_(torch.eye(3))
    routing = router(logits([[0, LN2, 2 * LN2]]))
    assert routing.experts is None
    assert routing.weights.tolist() == [[pytest.approx([1 / 7, 2 / 7, 4 / 7])]]


def test_probabilities_are_at_least_float32() -> None:
    assert router_probs(torch.zeros(1, 2, dtype=torch.bfloat16)).dtype == torch.float32
    assert router_probs(torch.zeros(1, 2, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_logits_are_not_rounded_under_autocast(hidden_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    router = Router(64, 8, top_k=2)
    nn.init.normal_(router.weight)
    hidden_states = torch.randn(2, 5, 64).to(hidden_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = router(hidden_states).logits
    assert found.dtype == torch.float32
    assert torch.equal(found, nn.functional.linear(hidden_states.float(), router.weight))


@pytest.mark.parametrize(
    ("rows", "top_k", "expected"),
    [
        # probabilities 1/4, 3/4 and 3/4, 1/4: mean 1/2 each, one first choice each -> 2 * (1/2*1/2 + 1/2*1/2)
        ([[0, math.log(3)], [math.log(3), 0]], 1, 1.0),
        # both tokens choose expert 0, whose mean probability is 3/4 -> 2 * 1 * 3/4
        ([[math.log(3), 0], [math.log(3), 0]], 1, 1.5),
        ([[math.log(3), 0], [math.log(3), 0]], None, 1.5),
        # probabilities 4/7, 2/7, 1/7; the two choices share the assignments -> 3 * (1/2*4/7 + 1/2*2/7)
        ([[2 * LN2, LN2, 0]], 2, 9 / 7),
        # every expert chosen: always balanced, whatever the probabilities
        ([[2 * LN2, LN2, 0]], 3, 1.0),
    ],
)
def test_load_balance_loss_by_hand(rows: list[list[float]], top_k: int | None, expected: float) -> None:
    assert load_balance_loss(logits(rows), top_k).item() == pytest.approx(expected, abs=1e-12)


def test_load_balance_gradient_pushes_the_crowded_expert_down() -> None:
    router_logits = logits([[1, 0], [1, 0]]).requires_grad_()
    load_balance_loss(router_logits, 1).backward()
    assert router_logits.grad is not None
    # d/dz_0 of 2 * mean(p_0), with p_0 = sigmoid(1), is p_0 * (1 - p_0) per token
    share = 1 / (1 + math.exp(-1))
    slope = share * (1 - share)
    assert router_logits.grad[0].tolist() == [pytest.approx([slope, -slope])] * 2


def test_z_loss_by_hand() -> None:
    two_and_four = logits([[0, 0], [math.log(3), 0]])  # the sums of their exponentials
    assert z_loss(two_and_four).item() == pytest.approx((LN2**2 + (2 * LN2) ** 2) / 2, abs=1e-12)


def test_entropy_by_hand() -> None:
    assert router_entropy(logits([[0, 0, 0, 0]])).item() == pytest.approx(2 * LN2, abs=1e-12)
    assert router_entropy(logits([[1000, 0]])).item() == pytest.approx(0, abs=1e-12)
