"""MoE's experts on their own tokens: grouped products where the device has them, equal to a loop."""

from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from src.model.config import Activation
from src.model.experts import choose_run_groups, ffn_matrices, run_groups_at_once, run_groups_in_turn


@pytest.mark.parametrize(("hidden_size", "inner_size"), [(8, 16), (8, 10), (6, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_grouped_products_are_those_of_the_loop(
    hidden_size: int, inner_size: int, dtype: torch.dtype, activation: Activation
) -> None:
    require_the_same(hidden_size, inner_size, dtype, activation)


def require_the_same(
    hidden_size: int, inner_size: int, dtype: torch.dtype, activation: Activation, device: str = "cpu"
) -> None:
    """Assert that both ways to run groups give the same outputs and gradients on a device."""
    torch.manual_seed(0)
    counts = torch.tensor([5, 0, 11, 4], device=device)
    into, out = (4, hidden_size, inner_size), (4, inner_size, hidden_size)
    shapes = [out if name == "down" else into for name in ffn_matrices(activation)]
    given = [torch.randn(shape).to(device, dtype) for shape in ((20, hidden_size), *shapes)]
    weights, found = torch.randn(20, hidden_size).to(device, dtype), list[list[Tensor]]()
    for run in (run_groups_in_turn, run_groups_at_once):
        tokens, *matrices = (nn.Parameter(tensor.clone()) for tensor in given)
        outputs = run(tokens, counts, matrices)
        (outputs * weights).sum().backward()
        found.append([outputs.detach(), *(part.grad for part in (tokens, *matrices) if part.grad is not None)])
    for expected, other in zip(*found, strict=True):
        torch.testing.assert_close(other, expected)
    assert not found[1][2][1].any()  # an expert without tokens


def test_autocast_also_holds_for_grouped_products() -> None:
    tokens, up, down = torch.randn(6, 8), torch.randn(2, 8, 8), torch.randn(2, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run_groups_at_once(tokens, torch.tensor([2, 4]), (up, down)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "expected"),
    [
        ("cpu", (9, 0), torch.bfloat16, run_groups_in_turn),
        ("cuda", (8, 0), torch.bfloat16, run_groups_in_turn),
        ("cuda", (9, 0), torch.bfloat16, run_groups_at_once),
        ("cuda", (10, 0), torch.bfloat16, run_groups_at_once),
        ("cuda", (9, 0), torch.float32, run_groups_in_turn),
    ],
)
def test_the_device_decides(
    device: str, capability: tuple[int, int], dtype: torch.dtype, expected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", Mock(return_value=capability))
    assert choose_run_groups(torch.device(device), dtype) is expected
