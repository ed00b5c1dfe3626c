"""Matrix products with half-precision weights, computed in float32 on processors without instructions for them.

Without AVX-512, torch multiplies bfloat16 matrices in a scalar loop: 512 rows times a weight of (3072, 768) take 120 ms
on two cores of Zen 3, but 16 ms in float32, casting included; stacked weights take a hundred times as long. Products of
a few rows with one weight are the exception: they have vector code, and read half the bytes of float32.

With AVX-512 BF16 the weights of inference are packed once for these instructions (`PackedWeight`): products of few rows
then take 0.6 to 0.7 times as long, and give the same bits. The norm that feeds them takes fewer calls there, too.

D inputs, F outputs, E experts, U rows.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.system.huge_pages import collapse
from src.system.private_api import can_pack_weights, pack_weight, packed_memory, packed_product

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


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` of the last dimension; without gradients, bfloat16 on a CPU takes 6 kernels instead of 9.

    At batch 1 that saves 2 % of a decode step. Either way it is computed in float32 and rounded once.
    """

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__(size, eps=eps)
        self._eps = torch.tensor(eps, device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., D), as `x`."""
        if x.dtype != torch.bfloat16 or x.device.type != "cpu" or torch.is_grad_enabled():
            return super().forward(x)
        wide = x.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # (..., 1)
        scale = torch.addcmul(self._eps, length, length, value=1 / x.shape[-1]).rsqrt_()
        return wide.mul_(scale).mul_(self.weight).to(x.dtype)


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


_METADATA = {
    "shape",
    "dtype",
    "device",
    "grad",
    "grad_fn",
    "requires_grad",
    "is_leaf",
    "is_meta",
    "is_mkldnn",
    "nbytes",
}
_QUESTIONS = {"size", "dim", "numel", "nelement", "element_size", "is_floating_point", "is_complex", "__len__"}
_POINTERS = {"data_ptr", "untyped_storage", "storage", "share_memory_"}


class PackedWeight(nn.Parameter):
    """A bfloat16 weight (F, D) in the order in which the processor's products read it, as large as the plain one.

    `linear` multiplies with it. For everything else it is the plain weight, unpacked each time: copies of a model, its
    `state_dict` and its conversions are plain. It cannot be changed, trained or addressed: RuntimeError.
    """

    packed: Tensor
    times: Callable[..., Tensor]

    @classmethod
    def of(cls, weight: Tensor) -> "PackedWeight":
        """Pack a copy of a bfloat16 weight on the CPU."""
        packed = pack_weight(weight)
        made = cls(packed, requires_grad=False)
        made.packed, made.times = packed, packed_product(packed)
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer what needs no values; call anything else with plain weights."""
        name, kwargs = func.__name__, kwargs or {}
        if name == "__get__":
            is_native = cast(Any, func).__self__.__name__ in _METADATA
        elif name in ("__set__", "requires_grad_"):  # to what it is, as `Module.to` does
            is_native = args[-1] is None or args[-1] is False or args[-1] is args[0]
        else:
            is_native = name in _QUESTIONS or name.startswith("_has_compatible")
        if is_native or (name == "to" and _stays(args[0], *args[1:], **kwargs)):
            return super().__torch_function__(func, types, args, kwargs)
        if name in _POINTERS or name in ("__set__", "__setitem__") or (name.endswith("_") and name[-2] != "_"):
            raise RuntimeError(
                f"{name} of a weight that is packed for this processor, which cannot be changed, trained or addressed; "
                "take a plain copy: copy.deepcopy(model), or model.state_dict()"
            )
        return func(*_plain(args), **{key: _plain(value) for key, value in kwargs.items()})

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        return memo.setdefault(id(self), nn.Parameter(self.packed.to_dense(), requires_grad=False))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(self.packed.to_dense(), requires_grad=False).__reduce_ex__(protocol)


def _stays(weight: PackedWeight, *args: Any, **kwargs: Any) -> bool:
    """Whether `weight.to(...)` would return the weight itself."""
    like = torch.empty(0, dtype=weight.packed.dtype)
    return like.to(*args, **kwargs) is like


def _plain(value: Any) -> Any:
    if isinstance(value, PackedWeight):
        return value.packed.to_dense()
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


def pack_weights(model: nn.Module, device: torch.device | str, dtype: torch.dtype | None) -> None:
    """Move and cast the `Linear` layers of `model`, and pack those in bfloat16 on a processor that gains from it.

    Each layer is packed before the next is cast, the largest first, so that memory never holds more than one twice. In
    huge pages they are read faster. A head that uses the embedding stays plain.
    """
    if not can_pack_weights():
        return
    layers = [layer for layer in model.modules() if isinstance(layer, Linear)]
    for layer in sorted(layers, key=lambda layer: -layer.weight.numel()):
        weight = layer.to(device=device, dtype=dtype).weight
        if weight.dtype == torch.bfloat16 and weight.device.type == "cpu":
            layer.weight = PackedWeight.of(weight.detach())
    collapse(packed_memory(layer.weight.packed) for layer in layers if isinstance(layer.weight, PackedWeight))


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return (..., F): inputs (..., D) times the transpose of a weight (F, D), plus a bias (F,)."""
    if isinstance(weight, PackedWeight):
        if inputs.dtype == torch.bfloat16 and not (inputs.requires_grad and torch.is_grad_enabled()):
            return weight.times(inputs, B=bias)
        return F.linear(inputs, weight.packed.to_dense(), bias)
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
