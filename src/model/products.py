"""Matrix products with half-precision weights, computed in float32 on processors without instructions for them.

Without AVX-512, torch multiplies bfloat16 matrices in a scalar loop: 512 rows times a weight of (3072, 768) take 120 ms
on two cores of Zen 3, but 16 ms in float32, casting included; stacked weights take a hundred times as long. Products of
a few rows with one weight are the exception: they have vector code, and read half the bytes of float32.

D inputs, F outputs, E experts, U rows.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEW_ROWS = 6
"""Up to this many rows, a half-precision weight is read faster than it is cast."""
CAST_BYTES = 16 * 2**20
"""Largest float32 copy of part of a weight; a vocabulary head is larger."""


_NEEDS = {  # any of these sets of instructions, as the errors of torch's oneDNN products say; `bf16` is ARM's
    torch.bfloat16: ({"avx512_bw", "avx512_vl", "avx512_dq"}, {"avx_ne_convert"}, {"bf16"}),
    torch.float16: ({"avx512_fp16"}, {"avx_ne_convert"}),
}


def _without_instructions() -> frozenset[torch.dtype]:
    present = {name for name, value in torch.cpu.get_capabilities().items() if value is True}
    is_fast = {dtype: any(names <= present for names in sets) for dtype, sets in _NEEDS.items()}
    return frozenset(dtype for dtype in _NEEDS if not (is_fast[dtype] and torch.backends.mkldnn.is_available()))


SLOW_ON_CPU = _without_instructions()
"""Dtypes whose matrices this processor multiplies in a scalar loop."""


class Linear(nn.Linear):
    """`nn.Linear`, by default without bias: weight (F, D), inputs (..., D), outputs (..., F)."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        return linear(input, self.weight, self.bias)


class TiedHead(nn.Module):
    """A vocabulary head that uses the weight (V, D) of an embedding.

    It owns none itself, so what counts, saves or shards parameters meets the weight once.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple, or it would be registered as a part of the head, too

    @property
    def weight(self) -> Tensor:
        return self._embedding[0].weight

    def forward(self, hidden_states: Tensor) -> Tensor:
        return linear(hidden_states, self.weight)


Head = nn.Linear | TiedHead
"""Maps hidden states (..., D) to logits (..., V)."""


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return (..., F): inputs (..., D) times the transpose of a weight (F, D), plus a bias (F,)."""
    if inputs.numel() <= FEW_ROWS * inputs.shape[-1] or not _is_cast(inputs):
        return F.linear(inputs, weight, bias)
    products = _cast_product(inputs, weight.t())
    return products if bias is None else products + bias


def product(inputs: Tensor, weight: Tensor) -> Tensor:
    """Return (..., F): inputs (..., D) times a weight (D, F)."""
    return _cast_product(inputs, weight) if _is_cast(inputs) else inputs @ weight


def stacked_product(inputs: Tensor, weights: Tensor) -> Tensor:
    """Return (E, U, F): each expert's inputs (E, U, D) times its weight (E, D, F)."""
    if not _is_cast(inputs):
        return torch.bmm(inputs, weights)
    return torch.stack([_cast_product(rows, weight) for rows, weight in zip(inputs, weights, strict=True)])


def _is_cast(inputs: Tensor) -> bool:
    """Whether to compute in float32; with gradients, autograd would keep a float32 copy of every weight."""
    return inputs.dtype in SLOW_ON_CPU and inputs.device.type == "cpu" and not torch.is_grad_enabled()


def _cast_product(inputs: Tensor, weight: Tensor) -> Tensor:
    floats, columns = inputs.float(), max(1, CAST_BYTES // (4 * len(weight)))
    return torch.cat([floats @ part.float() for part in weight.split(columns, dim=1)], dim=-1).to(inputs.dtype)


def computed_dtype(inputs: Tensor) -> torch.dtype:
    """Return the type in which products of `inputs` are computed: that of autocast, where it is active."""
    kind = inputs.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else inputs.dtype
