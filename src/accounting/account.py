"""Parameters, offloaded bytes and training memory of a config. Builds the model on the meta device: shapes, no storage.

D hidden, F intermediate, E experts, K active experts, L layers, V vocabulary.
"""

from dataclasses import asdict, dataclass

import torch

from src.accounting.flops import (
    Flops,
    estimated_unique_ids,
    forward_flops,
    lookup_flops,
    once_per_unique_id,
    training_flops,
)
from src.errors import ConfigError, LutError
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


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes on each device that hold as long as training does; activations and DDP's buckets come on top."""

    weights: int
    gradients: int
    optimizer_states: int

    @property
    def total(self) -> int:
        """All three."""
        return self.weights + self.gradients + self.optimizer_states


@dataclass(frozen=True, kw_only=True)
class Account:
    """What a model costs."""

    architecture: str
    parameters: Parameters
    offload: list[Offload]
    """In every precision the offloaded part can be stored in; empty for Dense."""
    skipped_precisions: dict[str, str]
    """Precisions that this model's table cannot have, and why."""
    micro_batch_tokens: int
    sequence_length: int
    expert_execution: str
    """Which of the two training forms the config asks for; Dense and MoE have one."""
    unique_ids: int
    """Distinct ids per micro-batch that `training_unique` assumes."""
    unique_ids_estimated: bool
    """True when nobody stated `unique_ids`."""
    training_per_token: Flops
    """Experts at every position."""
    training_unique: Flops | None
    """Experts once per distinct id of a micro-batch; only MoLE has this form."""
    inference: Flops
    """A prompt of one window, in the lookup form where there is one."""
    memory: TrainingMemory

    def to_dict(self) -> dict[str, object]:
        """Return plain values with totals, for JSON."""
        values = asdict(self)
        for name in ("training_per_token", "training_unique", "inference", "memory"):
            if (section := getattr(self, name)) is not None:
                values[name]["total"] = section.total
        return values


def account(
    model: ModelConfig, *, sequence_length: int, micro_batch_size: int, precision: str, unique_ids: int | None = None
) -> Account:
    """Count what `model` costs.

    Args:
        model: any architecture.
        sequence_length: tokens per window; attention's share depends on it.
        micro_batch_size: windows per forward pass, over which distinct ids are shared.
        precision: `trainer.precision`; only its 16- and 64-bit `true` forms change the size of what is stored.
        unique_ids: distinct ids per micro-batch; None estimates them (see `estimated_unique_ids`).

    Raises:
        ConfigError: `unique_ids` is more than a micro-batch can hold.
    """
    tokens = sequence_length * micro_batch_size
    distinct = estimated_unique_ids(tokens, model.vocab_size) if unique_ids is None else unique_ids
    if not 1 <= distinct <= min(tokens, model.vocab_size):
        raise ConfigError(
            f"unique ids: {distinct}, but a micro-batch of {tokens} tokens over {model.vocab_size} ids "
            f"has 1..{min(tokens, model.vocab_size)}"
        )
    parameters = count_parameters(model)
    offload, skipped = _offload(model, parameters)
    forward = forward_flops(model, sequence_length)
    training, is_mole = training_flops(forward, model), model.architecture == "mole"
    return Account(
        architecture=model.architecture,
        parameters=parameters,
        offload=offload,
        skipped_precisions=skipped,
        micro_batch_tokens=tokens,
        sequence_length=sequence_length,
        expert_execution=model.expert_execution,
        unique_ids=distinct,
        unique_ids_estimated=unique_ids is None,
        training_per_token=training,
        training_unique=once_per_unique_id(training, distinct, tokens) if is_mole else None,
        inference=lookup_flops(forward) if is_mole else forward,
        memory=training_memory(parameters.trained, precision),
    )


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


def training_memory(num_parameters: int, precision: str) -> TrainingMemory:
    """Weights, gradients and AdamW's two moments, all of one type; autocast keeps them in float32."""
    size = {"bf16-true": 2, "64-true": 8}.get(precision, 4)
    stored = num_parameters * size
    return TrainingMemory(weights=stored, gradients=stored, optimizer_states=2 * stored)


def _offload(model: ModelConfig, parameters: Parameters) -> tuple[list[Offload], dict[str, str]]:
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
