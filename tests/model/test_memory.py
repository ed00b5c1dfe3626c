"""No mixture makes a tensor of every expert's output at every position, forward or backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from src.model.experts import HiddenExperts, mix
from src.model.router import Routing, router_probs

TOKENS, EXPERTS, HIDDEN, INNER, UNIQUE = 64, 8, 32, 4, 16


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any result had."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def routing(top_k: int | None) -> Routing:
    logits = torch.randn(2, TOKENS // 2, EXPERTS, requires_grad=True)
    if top_k is None:
        return Routing(logits, router_probs(logits), None)
    chosen, experts = logits.topk(top_k)
    return Routing(logits, router_probs(chosen), experts)


def mole() -> Tensor:
    rows = torch.randn(EXPERTS, UNIQUE, HIDDEN, requires_grad=True).transpose(0, 1)  # (U, E, D)
    return mix(rows, routing(None), torch.randint(UNIQUE, (2, TOKENS // 2)))


def moe(top_k: int | None) -> Tensor:
    experts = HiddenExperts(EXPERTS, HIDDEN, INNER)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    return experts.mixture(torch.randn(2, TOKENS // 2, HIDDEN, requires_grad=True), routing(top_k))


@pytest.mark.parametrize("mixture", [mole, lambda: moe(2), lambda: moe(None)], ids=["mole", "moe-top2", "moe-full"])
def test_no_tensor_holds_every_experts_output(mixture: Callable[[], Tensor]) -> None:
    with LargestTensor() as largest:
        mixture().sum().backward()
    assert TOKENS * HIDDEN <= largest.numel <= TOKENS * EXPERTS * HIDDEN // 4
