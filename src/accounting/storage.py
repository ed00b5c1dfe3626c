"""What a config stores: parameters, and the part of them that is offloaded at inference.

Builds the model on the meta device: shapes, no storage.

D hidden, F intermediate, E experts, K active experts, L layers, V vocabulary.
"""

from dataclasses import dataclass

import torch

from src.errors import LutError
from src.lut.layout import TableLayout
from src.lut.quantization import CODECS, FloatCodec
from src.model import ModelConfig, Transformer
from src.optimization import parameter_part


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers of values, not bytes."""

    trained: int
    """All weights of the training form."""
    experts: int
    """Of these, routed experts and their norms."""
    resident: int
    """What stays in memory at inference when the experts are offloaded: everything else."""
    offloaded: int
    """What is offloaded, in the paper's count: MoE's expert weights, L E 2 D F; MoLE's table, L E D V."""
    loaded_per_token: int
    """Values fetched per token: MoLE L E D; MoE L K 2 D F, its worst case of no expert still being there."""


@dataclass(frozen=True, kw_only=True)
class Offload:
    """The offloaded part in one precision."""

    precision: str
    total_bytes: int
    bytes_per_token: int


def count_parameters(model: ModelConfig) -> Parameters:
    """Count the model's parameters as it is built."""
    with torch.device("meta"):
        named = list(Transformer(model).named_parameters())
    trained = sum(parameter.numel() for _, parameter in named)
    experts = sum(parameter.numel() for name, parameter in named if parameter_part(name) == "experts")
    if model.architecture == "mole":
        loaded = model.num_layers * model.num_experts * model.hidden_size
        offloaded = loaded * model.vocab_size
    else:
        loaded = model.num_layers * model.active_experts * 2 * model.hidden_size * model.expert_intermediate_size
        offloaded = experts
    return Parameters(
        trained=trained, experts=experts, resident=trained - experts, offloaded=offloaded, loaded_per_token=loaded
    )


def offloaded_bytes(model: ModelConfig, parameters: Parameters) -> tuple[list[Offload], dict[str, str]]:
    """Return the offloaded part in each precision, and why a table cannot have the others."""
    offload: list[Offload] = []
    skipped: dict[str, str] = {}
    for precision, codec in CODECS.items():
        try:
            if model.architecture == "mole":
                layout = TableLayout(**_table_sizes(model), precision=precision)
                total, per_token = layout.table_bytes, layout.row_bytes
            elif model.architecture == "moe" and isinstance(codec, FloatCodec):
                size = codec.dtype.itemsize
                total, per_token = parameters.offloaded * size, parameters.loaded_per_token * size
            else:
                continue
        except LutError as error:
            skipped[precision] = str(error)
        else:
            offload.append(Offload(precision=precision, total_bytes=total, bytes_per_token=per_token))
    return offload, skipped


def _table_sizes(model: ModelConfig) -> dict[str, int]:
    return {name: getattr(model, name) for name in ("vocab_size", "num_layers", "num_experts", "hidden_size")}
