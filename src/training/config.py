"""How a model is trained: objective, optimizer, Trainer, W&B and checkpoints."""

import os
import re
from dataclasses import dataclass, field
from typing import Literal

from src.errors import ConfigError, check_range
from src.system.hardware import device_count, native_precision, resolved_accelerator
from src.system.ranks import launcher


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Terms added to the language-model loss; both are logged whatever their weight."""

    load_balance_weight: float = 0.0
    """Weight of the load-balance loss, per micro-batch, mean over layers; the paper uses 0 for MoLE, 0.01 for MoE."""
    z_loss_weight: float = 0.0
    """Weight of the router z-loss, per micro-batch, mean over layers; the paper uses 0 for MoLE, 0.001 for MoE."""

    def __post_init__(self) -> None:
        check_range(self, "objective.", ("load_balance_weight", "z_loss_weight"), at_least=0)


@dataclass(frozen=True, kw_only=True)
class Multipliers:
    """Per-group factors on the optimizer settings."""

    learning_rate: float = 1.0
    """Factor on `optimizer.learning_rate`, at least 0; 0 keeps the group as it is."""
    weight_decay: float = 1.0
    """Factor on `optimizer.weight_decay`, at least 0; 0 disables decay for the group. AdamW multiplies decay by
    the learning rate, so the other factor scales it too."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and the learning rate over `trainer.max_steps`."""

    learning_rate: float = 6e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: `cosine` falls until the end, `wsd` holds the peak and falls linearly over the last
    `decay_steps`, `constant` holds it."""
    min_learning_rate_ratio: float = 0.1
    """Final learning rate of `cosine` and `wsd` as a share of the peak, in 0..1."""
    warmup_steps: int = 100
    """Optimizer steps of linear warm-up."""
    decay_steps: int | None = None
    """Optimizer steps of the final decay of `wsd`, which starts no earlier than the warm-up ends; null is a tenth of
    `trainer.max_steps`. Only for `wsd`."""
    weight_decay: float = 0.01
    """Decay of every parameter with more than one dimension."""
    backbone_multipliers: Multipliers = field(default_factory=Multipliers)
    """For all but routed experts, their norms and the routers; the embedding's come on top. With a learning rate of 0
    nothing is computed or kept for training these weights, as it is for experts that are added to a trained model."""
    embedding_multipliers: Multipliers = field(default_factory=Multipliers)
    """For the token embedding, with the vocabulary head where it is tied to it."""
    expert_multipliers: Multipliers = field(default_factory=Multipliers)
    """For routed experts, of MoLE and MoE, and their norms; not for routers and the shared expert."""
    beta1: float = 0.9
    """Adam's decay of the first moment."""
    beta2: float = 0.95
    """Adam's decay of the second moment."""
    epsilon: float = 1e-8
    """Adam's denominator offset."""
    gradient_clip_norm: float = 1.0
    """Largest global gradient norm; 0 does not clip."""

    def __post_init__(self) -> None:
        check_range(self, "optimizer.", ("learning_rate",), above=0)
        check_range(self, "optimizer.", ("min_learning_rate_ratio",), at_least=0, at_most=1)
        check_range(self, "optimizer.", ("beta1", "beta2"), at_least=0, below=1)
        not_negative = ("warmup_steps", "weight_decay", "epsilon", "gradient_clip_norm")
        check_range(self, "optimizer.", not_negative, at_least=0)
        for part in ("backbone_multipliers", "embedding_multipliers", "expert_multipliers"):
            factors = ("learning_rate", "weight_decay")
            check_range(getattr(self, part), f"optimizer.{part}.", factors, at_least=0)
        if self.decay_steps is not None and self.schedule != "wsd":
            raise ConfigError(
                f"optimizer.decay_steps: {self.decay_steps}, but the {self.schedule} schedule has no final decay; "
                "set it to null, or optimizer.schedule=wsd"
            )
        check_range(self, "optimizer.", ("decay_steps",), at_least=1)

    @property
    def trains_backbone(self) -> bool:
        """Whether more is trained than experts and routers."""
        return self.backbone_multipliers.learning_rate > 0


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Lightning's Trainer; names and meanings are Lightning's."""

    max_steps: int
    """Optimizer steps; also the length of the learning-rate schedule."""
    max_time: str | None = None
    """Stop training after DD:HH:MM:SS; table and evaluation still follow."""
    accelerator: Literal["auto", "cpu", "gpu", "cuda"] = "auto"
    """auto is cuda if there is a CUDA device, else cpu."""
    devices: str = "auto"
    """Number of devices, a list such as 0,1, or auto."""
    num_nodes: int = 1
    """Machines."""
    strategy: Literal["auto", "ddp", "ddp_fork", "fsdp2"] = "auto"
    """How devices work together: with ddp each holds the model, with fsdp2 a part; auto is ddp for several devices."""
    shard_devices: int | None = None
    """With strategy fsdp2: devices that hold one copy of the model together, a divisor of all devices; each further
    group holds another copy (HSDP). null is the devices of one machine."""
    precision: Literal["auto", "32-true", "bf16-mixed", "bf16-true", "64-true"] = "auto"
    """auto is bf16-mixed if the accelerator computes in bfloat16, else 32-true."""
    val_check_interval: int = 200
    """Optimizer steps between validations; each also writes a checkpoint."""
    limit_val_batches: int | None = None
    """Validation batches at most; null takes all of data.validation_windows."""
    num_sanity_val_steps: int = 0
    """Validation batches before training starts, to find errors early."""
    log_every_n_steps: int = 10
    """Optimizer steps between log entries."""
    non_finite: Literal["stop", "skip"] = "stop"
    """If a loss or gradient is not finite: stop the run, or skip the step and count it as train/skipped_steps."""
    compile: bool = False
    """Compile blocks and experts with torch.compile, which takes a while in the first steps."""
    deterministic: bool = False
    """Raise an error on operations that are not deterministic."""
    fast_dev_run: bool = False
    """Run one step of everything, without loggers and checkpoints."""
    enable_progress_bar: bool = True
    """Show progress on the terminal."""

    def __post_init__(self) -> None:
        check_range(self, "trainer.", ("max_steps", "val_check_interval", "log_every_n_steps"), at_least=1)
        check_range(self, "trainer.", ("num_nodes",), at_least=1, at_most=2**16)
        check_range(self, "trainer.", ("shard_devices",), at_least=1)
        check_range(self, "trainer.", ("limit_val_batches",), at_least=0)
        check_range(self, "trainer.", ("num_sanity_val_steps",), at_least=-1)
        if not re.fullmatch(r"auto|-1|[1-9]\d{0,3}|\d{1,4},|\d{1,4}(,\d{1,4})+", self.devices):
            raise ConfigError(
                f"trainer.devices: {self.devices!r}, but it must be a number such as 2, a list such as 0,1, or auto"
            )
        if self.max_time is not None and not re.fullmatch(r"\d{1,6}:\d{2}:\d{2}:\d{2}", self.max_time):
            raise ConfigError(f'trainer.max_time: {self.max_time!r}, but it must be DD:HH:MM:SS, such as "00:00:04:00"')
        if self.shard_devices is not None and self.strategy != "fsdp2":
            raise ConfigError(
                f"trainer.shard_devices: {self.shard_devices}, but trainer.strategy {self.strategy} shards nothing; "
                "set it to null, or trainer.strategy=fsdp2"
            )

    @property
    def resolved_precision(self) -> Literal["32-true", "bf16-mixed", "bf16-true", "64-true"]:
        """`precision`, with `auto` resolved for this machine."""
        if self.precision != "auto":
            return self.precision
        if self.strategy == "ddp_fork" and resolved_accelerator(self.accelerator) == "cuda":
            raise ConfigError(
                "trainer.precision: auto asks the GPU, which a process may not use before trainer.strategy ddp_fork "
                "forks it; set trainer.precision=bf16-mixed, or trainer.strategy=ddp"
            )
        return native_precision(self.accelerator)

    @property
    def world_size(self) -> int:
        """Devices on all machines; `auto` counts those of this one."""
        if "," in self.devices:  # a list of indices
            return self.num_nodes * len([index for index in self.devices.split(",") if index.strip()])
        return self.num_nodes * (int(self.devices) if self.devices.isdecimal() else device_count(self.accelerator))

    @property
    def shard_group_size(self) -> int:
        """`shard_devices`, with null resolved; ConfigError if groups of so many devices would not be equal."""
        size = self.shard_devices or self.world_size // self.num_nodes
        if self.world_size % size:
            raise ConfigError(
                f"trainer.shard_devices: {size} does not divide the {self.world_size} devices of this run; take a "
                "divisor of them, or null for the devices of one machine"
            )
        return size


def require_ranks(config: TrainerConfig) -> None:
    """Raise ConfigError if a launcher started other ranks than those of `config`, or is none that works here.

    Lightning would go on with another number of ranks, or wait for those that nobody starts.
    """
    name, started = launcher()
    wanted, nodes = config.world_size, os.environ.get("SLURM_NNODES") if name == "srun" else None
    if name not in ("", "torchrun", "srun"):
        raise ConfigError(
            f"{name} started {started} processes, but only torchrun and srun can start ranks here; take one of them, "
            "or start one process, which starts the others of its machine"
        )
    if name and (started != wanted or nodes not in (None, str(config.num_nodes))):
        raise ConfigError(
            f"trainer.devices: {config.devices} on {config.num_nodes} machines (trainer.num_nodes) are {wanted} ranks, "
            f"but {name} started {started}{f' on {nodes}' if nodes else ''}; let both agree"
        )
    if name and started > 1 and config.strategy == "ddp_fork":
        raise ConfigError(f"trainer.strategy: ddp_fork starts its ranks, but {name} has started them; set it to ddp")
    if not name and config.num_nodes > 1 and not {"NODE_RANK", "GROUP_RANK"} & set(os.environ):
        raise ConfigError(
            f"trainer.num_nodes: {config.num_nodes}, but this process is the only one; start one for each device with "
            "srun or torchrun, or one on each machine with NODE_RANK, MASTER_ADDR and MASTER_PORT set"
        )


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases. The run directory always gets the same metrics as a CSV."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto is what the environment's WANDB_MODE says, else online if an API key is set up, else offline."""
    project: str | None = None
    """Project that the run appears in; null is the environment's WANDB_PROJECT, else mole."""
    entity: str | None = None
    """User or team; null is the account's default."""
    tags: list[str] = field(default_factory=list[str])
    """Labels of the run."""
    log_table: bool = False
    """At the end, also send the lookup table as an artifact (the report is always sent). Tables are large."""

    def __post_init__(self) -> None:
        if self.project is not None and not re.fullmatch(r"[^/\\#?%:]{1,128}", self.project):
            raise ConfigError(
                f"wandb.project: {self.project!r}, but W&B takes up to 128 characters and none of /\\#?%:"
            )
        if wrong := [tag for tag in self.tags if not 1 <= len(tag) <= 64]:
            raise ConfigError(f"wandb.tags: {wrong[0]!r}, but W&B takes tags of 1 to 64 characters")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints, for resuming and for choosing weights."""

    every_steps: int | None = None
    """Optimizer steps between checkpoints, in addition to those after each validation and after the last step; null
    writes only these."""
    keep_last: int = 1
    """Newest checkpoints to keep, at least 1."""
    keep_best: int = 1
    """Checkpoints of the lowest validation loss to keep; 0 keeps none for their loss."""
    sharded: bool = False
    """With trainer.strategy=fsdp2: every rank writes its part into a directory, instead of rank 0 a whole file."""
    ema_decay: float | None = None
    """Decay per step of an exponential moving average of the weights, above 0 and below 1. Validation, table and
    checkpoints then use the average; training continues with its own weights. null disables it."""
    final_weights: Literal["last", "best"] = "last"
    """Weights that become backbone, experts and table at the end: those of the last step, or of the checkpoint with the
    lowest validation loss."""

    def __post_init__(self) -> None:
        check_range(self, "checkpoint.", ("every_steps", "keep_last"), at_least=1)
        check_range(self, "checkpoint.", ("keep_best",), at_least=0)
        check_range(self, "checkpoint.", ("ema_decay",), above=0, below=1)
        if self.final_weights == "best" and self.keep_best < 1:
            raise ConfigError("checkpoint.final_weights: best, but checkpoint.keep_best is 0; keep at least 1")
