"""The chunked vocabulary loss against the plain one."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.model import loss as loss_module
from src.model.loss import next_token_loss, token_losses


@pytest.fixture(params=[1, 5, 1000])
def chunk_tokens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tokens per chunk: single ones, some that do not divide the batch, all at once."""
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 4 * 37 * request.param)
    return request.param


def problem(dtype: torch.dtype) -> tuple[Tensor, nn.Linear, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(8, 37, bias=False, dtype=dtype)
    hidden = torch.randn(3, 7, 8, dtype=dtype, requires_grad=True)
    return hidden, head, torch.randint(37, (3, 7))


@pytest.mark.usefixtures("chunk_tokens")
def test_loss_and_gradients_are_those_of_the_plain_loss() -> None:
    hidden, head, targets = problem(torch.float64)
    loss = next_token_loss(hidden, head, targets)
    found = torch.autograd.grad(3 * loss, (hidden, head.weight))
    plain = F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten())
    expected = torch.autograd.grad(3 * plain, (hidden, head.weight))
    torch.testing.assert_close(loss, plain, atol=1e-12, rtol=0)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    torch.testing.assert_close(token_losses(hidden, head, targets).mean(), plain, atol=1e-12, rtol=0)


def test_finite_differences_agree() -> None:
    hidden, head, targets = problem(torch.float64)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        layer = nn.Linear(8, 37, bias=False)
        del layer.weight
        layer.weight = weight  # type: ignore[assignment]
        return next_token_loss(hidden, layer, targets)

    assert torch.autograd.gradcheck(loss, (hidden, head.weight))


@pytest.mark.usefixtures("chunk_tokens")
def test_autocast_runs_products_in_bfloat16_and_keeps_the_loss_wide() -> None:
    hidden, head, targets = problem(torch.float32)
    exact = torch.autograd.grad(next_token_loss(hidden, head, targets), (hidden, head.weight))
    with torch.autocast("cpu", torch.bfloat16):
        loss = next_token_loss(hidden, head, targets)
        plain = F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain, atol=1e-3, rtol=0)
    found = torch.autograd.grad(loss, (hidden, head.weight))
    theirs = torch.autograd.grad(plain, (hidden, head.weight))
    for ours, plain_gradient, right in zip(found, theirs, exact, strict=True):
        assert (ours - right).norm() <= 1.05 * (plain_gradient - right).norm()


def test_a_frozen_part_gets_no_gradient() -> None:
    hidden, head, targets = problem(torch.float32)
    head.requires_grad_(False)
    next_token_loss(hidden, head, targets).backward()
    assert hidden.grad is not None
    assert head.weight.grad is None


def test_no_logits_are_kept_for_the_backward_pass() -> None:
    hidden, head, targets = problem(torch.float32)
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        next_token_loss(hidden, head, targets)
    assert max(kept) <= max(hidden.numel(), head.weight.numel())


def test_the_chunk_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "ACCELERATOR_CHUNK_BYTES", 4 * 100 * 37)
    for device, expected in (("cpu", [300]), ("meta", [64, 64, 64, 64, 44])):
        chunks, head = list[int](), nn.Linear(8, 37, bias=False, device=device)
        head.register_forward_hook(lambda _, inputs, __, chunks=chunks: chunks.append(len(inputs[0])))
        token_losses(torch.zeros(3, 100, 8, device=device), head, torch.zeros(3, 100, dtype=torch.int64, device=device))
        assert chunks == expected
