"""Everything a config costs, put together: what it stores and what it computes."""

from dataclasses import asdict, dataclass

from src.accounting.flops import (
    Flops,
    estimated_unique_ids,
    forward_flops,
    lookup_flops,
    once_per_unique_id,
    training_flops,
)
from src.accounting.storage import Offload, Parameters, count_parameters, offloaded_bytes
from src.accounting.training_memory import DeviceMemory, ExpertMemory, expert_memory, sharded_memory, whole_memory
from src.errors import ConfigError
from src.model import ModelConfig

SHARDED_OVER = (8, 64)
"""Numbers of devices that the account of FSDP2 supposes."""


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
    micro_batches: int
    """Forward passes of one device per optimiser step."""
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
    memory: list[DeviceMemory]
    """What a device keeps in training, by strategy."""
    expert_memory: list[ExpertMemory]
    """What embedding experts add to it, by execution; empty for Dense and MoE."""

    def to_dict(self) -> dict[str, object]:
        """Return plain values with totals, for JSON."""
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
) -> Account:
    """Count what `model` costs.

    Args:
        model: any architecture.
        sequence_length: tokens per window; attention's share depends on it.
        micro_batch_size: windows per forward pass, over which distinct ids are shared.
        precision: `trainer.precision`; only its 16- and 64-bit `true` forms change the size of what is stored.
        micro_batches: forward passes of one device per optimiser step, whose distinct ids `unique_per_step` shares.
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
    offload, skipped = offloaded_bytes(model, parameters)
    forward = forward_flops(model, sequence_length)
    training, is_mole = training_flops(forward, model), model.architecture == "mole"
    step_ids = max(distinct, estimated_unique_ids(tokens * micro_batches, model.vocab_size))
    executions = {"per_token": tokens, "unique": distinct, "unique_per_step": step_ids} if is_mole else {}
    return Account(
        architecture=model.architecture,
        parameters=parameters,
        offload=offload,
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
            whole_memory(parameters.trained, precision),
            *(sharded_memory(model, precision, devices) for devices in SHARDED_OVER),
        ],
        expert_memory=[expert_memory(model, name, num_ids, precision) for name, num_ids in executions.items()],
    )
