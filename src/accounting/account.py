"""What a config costs: parameters and their offloaded part, FLOPs, and the memory of a device in training.

Counts on a model built on the meta device, which has shapes and no storage.

D hidden, F an expert's intermediate, E experts, K active experts, L layers, V vocabulary, U token ids of the experts.
"""

from collections import Counter
from dataclasses import asdict, dataclass

from torch import Tensor, nn

from src.accounting.flops import (
    Flops,
    estimated_unique_ids,
    forward_flops,
    lookup_flops,
    meta_model,
    once_per_unique_id,
    training_flops,
)
from src.errors import ConfigError, LutError
from src.lut.codecs import CODECS
from src.lut.layout import TableLayout
from src.model import ModelConfig
from src.model.sharding import shard_dimension, shard_groups, wide_modules
from src.model.transformer import parameter_part


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers of values, not bytes."""

    trained: int
    """All weights of the training form, but those that are frozen."""
    frozen: int
    """Weights of the training form that a backbone learning rate of 0 keeps as they are."""
    experts: int
    """Of the trained ones, routed experts and their norms."""
    resident: int
    """What stays in memory at inference when the experts are offloaded."""
    offloaded: int
    """What is offloaded, in the paper's count: MoE's expert weights, L E 2 D F (3 D F with SwiGLU); MoLE's table,
    L E D V. Of L, only layers that have experts count."""
    loaded_per_token: int
    """Values fetched per token: MoLE L E D; MoE at most those of K of its E experts, with none in memory yet."""


@dataclass(frozen=True, kw_only=True)
class Offload:
    """The offloaded part in one precision."""

    precision: str
    total_bytes: int
    bytes_per_token: int


def count_parameters(model: ModelConfig, *, trains_backbone: bool = True) -> Parameters:
    """Count the model's parameters as it is built."""
    values = Counter[str]()
    for name, parameter in meta_model(model).named_parameters():
        values[parameter_part(name)] += parameter.numel()
    frozen = 0 if trains_backbone else values["backbone"] + values["embedding"]
    total, experts = values.total(), values["experts"]
    if model.architecture == "mole":
        loaded = len(model.mixture_layers) * model.num_experts * model.hidden_size
        offloaded = loaded * model.vocab_size
    else:
        loaded = experts * model.active_experts // max(1, model.num_experts)
        offloaded = experts
    return Parameters(
        trained=total - frozen,
        frozen=frozen,
        experts=experts,
        resident=total - experts,
        offloaded=offloaded,
        loaded_per_token=loaded,
    )


def offloaded_bytes(model: ModelConfig, parameters: Parameters) -> tuple[list[Offload], dict[str, str]]:
    """Return the offloaded part in each precision, and why a table cannot have the others."""
    offload: list[Offload] = []
    skipped: dict[str, str] = {}
    for precision, codec in CODECS.items():
        try:
            if model.architecture == "mole":
                layout = TableLayout.of(model, precision)
                total, per_token = layout.table_bytes, layout.row_bytes
            elif model.architecture == "moe" and codec.is_view:
                size = codec.dtype.itemsize
                total, per_token = parameters.offloaded * size, parameters.loaded_per_token * size
            else:
                continue
        except LutError as error:
            skipped[precision] = str(error)
        else:
            offload.append(Offload(precision=precision, total_bytes=total, bytes_per_token=per_token))
    return offload, skipped


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Bytes on the fullest device throughout training, without activations."""

    strategy: str
    """`whole`: one device alone, or each of DDP's, however many; `fsdp2`."""
    devices: int
    """How many share what `fsdp2` shards."""
    weights: int
    gradients: int
    optimizer_states: int
    """AdamW's two moments."""
    gathered: int
    """What FSDP2 gathers at most at a time: weights and gradients of embedding and head, and of two groups."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer_states + self.gathered


@dataclass(frozen=True, kw_only=True)
class ExpertMemory:
    """What one form of expert execution stores for the backward pass, over all layers."""

    execution: str
    token_ids: int
    """How many ids, distinct or not, the experts run on at once."""
    kept_bytes: int


def value_bytes(precision: str) -> int:
    """Bytes of a stored weight, gradient or moment under `trainer.precision`; autocast keeps float32."""
    return {"bf16-true": 2, "64-true": 8}.get(precision, 4)


def whole_memory(num_parameters: int, precision: str, frozen: int = 0) -> DeviceMemory:
    """Return the memory of a device that holds the whole model; DDP's buckets are its gradients.

    `num_parameters` are trained, `frozen` others are not.
    """
    size = value_bytes(precision)
    return DeviceMemory(
        strategy="whole",
        devices=1,
        weights=size * (num_parameters + frozen),
        gradients=size * num_parameters,
        optimizer_states=2 * size * num_parameters,
        gathered=0,
    )


def sharded_memory(model: ModelConfig, precision: str, devices: int) -> DeviceMemory:
    """Return the memory of one of `devices` under FSDP2: its part of everything, and what it gathers.

    At most two groups are whole at a time, one computing and one being gathered, and so are their gradients; embedding
    and head stay whole throughout (`src.model.sharding.shard_model`).
    """
    built = meta_model(model)
    size = value_bytes(precision)
    computed = 2 if precision == "bf16-mixed" else size

    def gathered_bytes(group: nn.Module) -> int:
        wide = sum(map(_num_values, wide_modules(group)))
        return (computed + size) * _num_values(group) + (size - computed) * wide

    groups = shard_groups(built)
    rest = _num_values(built) - sum(map(_num_values, groups))
    part = size * sum(_largest_part(parameter, devices) for parameter in built.parameters())
    return DeviceMemory(
        strategy="fsdp2",
        devices=devices,
        weights=part,
        gradients=part,
        optimizer_states=2 * part,
        gathered=2 * size * rest + sum(sorted(map(gathered_bytes, groups))[-2:]),
    )


def expert_memory(model: ModelConfig, execution: str, num_ids: int, precision: str) -> ExpertMemory:
    """Return the memory that embedding experts use for the backward pass when they run on `num_ids` ids at once.

    Per layer and id: the normed embedding, every expert's input, its F values before and after GELU (with SwiGLU those
    of up, of the gate before and after SiLU, and their product), and its row in at least float32, which the mixture
    stores. Checkpointing stores only the rows. `unique_per_step` adds their gradients.
    """
    gated = model.activation == "swiglu"
    stored = value_bytes(precision)
    computed, wide = 2 if "16" in precision else stored, max(stored, 4)
    vectors, inner = model.num_experts * model.hidden_size, model.num_experts * model.expert_intermediate_size
    if not model.gradient_checkpointing:
        inputs = computed * (model.hidden_size if computed == stored else vectors)  # autocast repeats what it casts
        if gated and computed != stored:
            inputs *= 2  # for the gate again
        per_id = wide * vectors + (4 if gated else 2) * computed * inner + inputs + stored * (model.hidden_size + 1)
    else:
        per_id = vectors * (wide if execution == "unique_per_step" else computed)
    if execution == "unique_per_step":
        per_id += wide * vectors
    return ExpertMemory(execution=execution, token_ids=num_ids, kept_bytes=len(model.mixture_layers) * num_ids * per_id)


def _largest_part(parameter: Tensor, devices: int) -> int:
    length = parameter.shape[shard_dimension(parameter, devices)]
    return -(-length // devices) * (parameter.numel() // length)


def _num_values(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


SHARDED_OVER = (8, 64)
"""Numbers of devices that hold a copy together, for which FSDP2 is accounted besides those of a config."""


@dataclass(frozen=True, kw_only=True)
class Account:
    """What a model costs."""

    architecture: str
    parameters: Parameters
    offload: list[Offload]
    """In every precision the offloaded part can be stored in; empty for Dense."""
    expert_ids: str
    """`seen`: a table has rows of the ids of the training text alone, so all sizes of it are at most."""
    skipped_precisions: dict[str, str]
    """Precisions that this model's table cannot have, and why."""
    micro_batch_tokens: int
    micro_batches: int
    """Forward passes of one device per optimizer step."""
    sequence_length: int
    expert_execution: str
    """Which of the two training forms the config asks for; Dense and MoE have one."""
    unique_ids: int
    """Distinct ids per micro-batch that `training_unique` assumes."""
    unique_ids_estimated: bool
    """True when `unique_ids` was not given."""
    training_per_token: Flops
    """Experts at every position."""
    training_unique: Flops | None
    """Experts once per distinct id of a micro-batch; only MoLE has this form."""
    inference: Flops
    """A prompt of one window, in the lookup form where there is one."""
    memory: list[DeviceMemory]
    """What a device keeps in training, by strategy."""
    expert_memory: list[ExpertMemory]
    """What embedding experts add to it, by execution; empty for Dense and MoE."""

    def to_dict(self) -> dict[str, object]:
        values = asdict(self)
        for name in ("training_per_token", "training_unique", "inference"):
            if (section := getattr(self, name)) is not None:
                values[name]["total"] = section.total
        for written, memory in zip(values["memory"], self.memory, strict=True):
            written["total"] = memory.total
        return values


def account(
    model: ModelConfig,
    *,
    sequence_length: int,
    micro_batch_size: int,
    precision: str,
    micro_batches: int = 1,
    unique_ids: int | None = None,
    shard_group_size: int | None = None,
    trains_backbone: bool = True,
) -> Account:
    """Count what `model` costs at `micro_batches` of `micro_batch_size` windows per optimizer step of one device.

    `precision` is `trainer.precision`. `unique_ids` are the distinct ids of a micro-batch, by default those of
    `estimated_unique_ids`; ConfigError when they are more than it can hold. `shard_group_size` devices share a copy of
    the model under FSDP2, which trains the backbone, too.
    """
    tokens = sequence_length * micro_batch_size
    distinct = estimated_unique_ids(tokens, model.vocab_size) if unique_ids is None else unique_ids
    if not 1 <= distinct <= min(tokens, model.vocab_size):
        raise ConfigError(
            f"unique ids: {distinct}, but a micro-batch of {tokens} tokens over {model.vocab_size} ids "
            f"has 1..{min(tokens, model.vocab_size)}"
        )
    parameters = count_parameters(model, trains_backbone=trains_backbone)
    offload, skipped = offloaded_bytes(model, parameters)
    forward = forward_flops(model, sequence_length)
    is_mole = model.architecture == "mole"
    training = training_flops(forward, model, trains_backbone=trains_backbone)
    step_ids = max(distinct, estimated_unique_ids(tokens * micro_batches, model.vocab_size))
    own = () if shard_group_size is None else (shard_group_size,)
    executions = {"per_token": tokens, "unique": distinct, "unique_per_step": step_ids} if is_mole else {}
    return Account(
        architecture=model.architecture,
        parameters=parameters,
        offload=offload,
        expert_ids=model.expert_ids,
        skipped_precisions=skipped,
        micro_batch_tokens=tokens,
        micro_batches=micro_batches,
        sequence_length=sequence_length,
        expert_execution=model.expert_execution,
        unique_ids=distinct,
        unique_ids_estimated=unique_ids is None,
        training_per_token=training,
        training_unique=once_per_unique_id(training, distinct, tokens) if is_mole else None,
        inference=lookup_flops(forward) if is_mole else forward,
        memory=[
            whole_memory(parameters.trained, precision, parameters.frozen),
            *(
                sharded_memory(model, precision, devices)
                for devices in sorted({*SHARDED_OVER, *own} if trains_backbone else ())
            ),
        ],
        expert_memory=[expert_memory(model, name, num_ids, precision) for name, num_ids in executions.items()],
    )
