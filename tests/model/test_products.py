"""Half-precision products on a processor without instructions for them; here every processor is told it is one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from src.model import ModelConfig, products
from tests.model.models import CONFIGS, build, token_ids

HALF = [torch.bfloat16, torch.float16]
ROWS, INPUTS, OUTPUTS, EXPERTS = products.FEW_ROWS + 1, 6, 10, 3


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SLOW_ON_CPU", frozenset(HALF))


def linear(inputs: Tensor, weight: Tensor) -> Tensor:
    layer = products.Linear(INPUTS, OUTPUTS)
    layer.weight = nn.Parameter(weight.t().contiguous())
    return layer(inputs)


CASES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "linear": (linear, (1, ROWS, INPUTS), (INPUTS, OUTPUTS)),
    "product": (products.product, (ROWS, INPUTS), (INPUTS, OUTPUTS)),
    "stacked": (products.stacked_product, (EXPERTS, ROWS, INPUTS), (EXPERTS, INPUTS, OUTPUTS)),
}


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("columns_at_once", [1, 4, OUTPUTS])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_cast_product_rounds_once(
    monkeypatch: pytest.MonkeyPatch, case: str, columns_at_once: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(products, "CAST_BYTES", 4 * INPUTS * columns_at_once)
    multiply, input_shape, weight_shape = CASES[case]
    torch.manual_seed(0)
    inputs, weight = torch.randn(input_shape).to(dtype), torch.randn(weight_shape).to(dtype)
    found = multiply(inputs, weight)
    assert found.dtype == dtype
    exact = inputs.double() @ weight.double()
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps / 2 * 1.001, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@torch.no_grad()
def test_a_bfloat16_norm_rounds_once(scale: float) -> None:
    norm, inputs = products.RMSNorm(96, eps=1e-5), torch.randn(3, 2, 96).mul(scale).bfloat16()
    norm.weight.copy_(torch.randn(96))
    norm.bfloat16()
    exact = nn.functional.rms_norm(inputs.double(), (96,), norm.weight.double(), norm.eps)
    found = norm(inputs)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(torch.bfloat16).eps / 2 * 1.001, atol=0)


@torch.no_grad()
def test_a_norm_is_torchs_but_for_bfloat16() -> None:
    norm, inputs = products.RMSNorm(96, eps=1e-5), torch.randn(3, 2, 96)
    assert torch.equal(norm(inputs), nn.functional.rms_norm(inputs, (96,), norm.weight, norm.eps))


class ProductDtypes(TorchDispatchMode):
    """Collects the dtypes of the matrix products that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default):
            self.found.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def product_dtypes(config: ModelConfig, num_tokens: int) -> set[torch.dtype]:
    model, ids = build(config).bfloat16(), token_ids(config, batch_size=1, length=num_tokens)
    with ProductDtypes() as dtypes:
        model(ids)
    return dtypes.found


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_prompt_makes_no_slow_product(name: str) -> None:
    assert product_dtypes(CONFIGS[name], num_tokens=ROWS) == {torch.float32}


@pytest.mark.usefixtures("slow")
@torch.no_grad()
def test_few_rows_of_a_dense_model_are_not_cast() -> None:
    assert product_dtypes(CONFIGS["dense"], num_tokens=products.FEW_ROWS) == {torch.bfloat16}


@pytest.mark.usefixtures("slow")
def test_with_gradients_nothing_is_cast() -> None:
    assert torch.bfloat16 in product_dtypes(CONFIGS["dense"], num_tokens=ROWS)


def test_float32_and_float64_are_never_cast() -> None:
    assert products.SLOW_ON_CPU.issubset(HALF)
