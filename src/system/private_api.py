"""The private attributes of Lightning and torch that this project depends on. No other module names one.

It imports nothing of Lightning, so that the model and its inference may import this package. A name that a new version
lacks raises RuntimeError where it is used; `tests/system/test_private_api.py` says what to check before an upper bound
in pyproject.toml is raised.
"""

from collections.abc import Callable
from functools import cache, partial
from subprocess import Popen
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def log_step_now(trainer: Any) -> None:
    """Send the metrics of this training step to the loggers before the step's remaining callbacks run.

    Lightning logs a step after its callbacks. A callback that saves a checkpoint and stops needs them logged before.
    Without it: the last step before a preemption is missing from `metrics.csv`.
    """
    _existing(trainer, "_logger_connector").update_train_step_metrics()


def set_logged_step(trainer: Any) -> None:
    """Set the step that the next metrics are logged under to the number of optimizer steps taken.

    Checkpoints saved during validation store `_batches_that_stepped` one too low. Lightning corrects this only if
    validation reruns right after resuming. Without it: steps are logged under the number before them.
    """
    loop = trainer.fit_loop.epoch_loop
    _existing(loop, "_batches_that_stepped")
    loop._batches_that_stepped = trainer.global_step


def run_hooks_without_steps(trainer: Any) -> None:
    """Let `fit` call the hooks of start and end when no step is left, where Lightning skips them.

    Without it: `--resume` of a run that has all its steps does nothing.
    """
    loop = trainer.fit_loop
    _existing(loop, "skip")
    loop.__class__ = type("FitLoop", (type(loop),), {"skip": False})


def keep_graphs_whole() -> None:
    """Do not split compiled layers at the size of DDP's buckets, as torch does for models compiled whole.

    Without it: compiled layers of a DDP run are cut in several graphs.
    """
    from torch._dynamo import config  # which takes seconds to import

    _existing(config, "optimize_ddp")
    config.optimize_ddp = False


def validate_now(trainer: Any) -> None:
    """Run a validation outside of the loop over steps, as the loop would after a step.

    Without it: a run that was stopped during a validation resumes without that validation.
    """
    loop = _existing(trainer.fit_loop.epoch_loop, "val_loop")
    trainer.validating, loop.restarting = True, False
    loop.run()
    trainer.training = True


def ranks_are_scripts(trainer: Any) -> bool:
    """Whether each of several ranks runs the command line on its own, rather than as a fork of one process.

    Without it: compare `trainer.strategy` of the config with the names of the forking strategies.
    """
    return trainer.world_size > 1 and not forks_ranks(trainer)


def forks_ranks(trainer: Any) -> bool:
    """Whether this process forks its ranks and only waits for them.

    Without it: compare `trainer.strategy` of the config with the names of the forking strategies.
    """
    launcher = trainer.strategy.launcher
    return launcher is not None and not _starts_scripts(launcher)


def started_ranks(trainer: Any) -> list[Popen[bytes]]:
    """Return the ranks that this process started: none above rank 0, and none under torchrun or srun."""
    launcher = trainer.strategy.launcher
    return list(launcher.procs) if _starts_scripts(launcher) else []


def use_all_devices(strategy: Any) -> None:
    """Make the data-parallel group of a `ModelParallelStrategy` as large as its number of devices.

    The number is known only after the constructor, which takes it as an argument. Without it: count the devices that
    `trainer.devices` selects, and pass `data_parallel_size`.
    """
    _existing(strategy, "_data_parallel_size")
    strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes


def drop_anonymous(logger: Any) -> None:
    """Do not pass `anonymous` to `wandb.init`: Lightning always does, and W&B warns that it has no effect."""
    _existing(logger, "_wandb_init").pop("anonymous", None)


def has_started(logger: Any) -> bool:
    """Whether a `WandbLogger` has begun its W&B run, without beginning it as `logger.experiment` would."""
    return _existing(logger, "_experiment") is not None


@cache
def can_pack_weights() -> bool:
    """Whether this processor and this torch multiply packed bfloat16 weights, with the results of plain ones.

    Without it: weights stay plain, and products of few rows take up to 1.7 times as long.
    """
    if not (torch.backends.mkldnn.is_available() and torch.cpu.get_capabilities().get("avx512_bf16")):
        return False
    generator = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(2, 64, 64, generator=generator, device="cpu").bfloat16()
    try:
        packed = pack_weight(weight)
        same_weight, same_product = packed.to_dense(), packed_product(packed)(inputs, B=weight[0])
    except (AttributeError, RuntimeError):  # another version
        return False
    return torch.equal(same_weight, weight) and torch.equal(same_product, F.linear(inputs, weight, weight[0]))


def pack_weight(weight: Tensor) -> Tensor:
    """Return a copy of a bfloat16 weight (F, D) as `packed_product` needs it; `to_dense()` gives the weight back."""
    return torch.ops.mkldnn._reorder_linear_weight.default(weight)


def packed_product(packed: Tensor) -> Callable[..., Tensor]:
    """Return a function that does with bfloat16 inputs (..., D) and a bias `B`, or None, what `F.linear` does."""
    linear = torch.ops.mkldnn._linear_pointwise.default
    return partial(linear, W=packed, attr="none", scalars=[], algorithm=None)


def packed_memory(packed: Tensor) -> tuple[int, int]:
    """Return the first address and the number of bytes of a packed weight; of none where torch does not say.

    Without it: packed weights stay in pages of 4 KiB, and a decode step of one sequence takes 6 % longer.
    """
    try:
        return torch.ops.mkldnn.data_ptr.default(packed), torch.ops.mkldnn._nbytes.default(packed)
    except (AttributeError, RuntimeError):  # another version
        return 0, 0


def _starts_scripts(launcher: Any) -> bool:
    return any(kind.__name__ == "_SubprocessScriptLauncher" for kind in type(launcher).__mro__)


def _existing(owner: object, name: str) -> Any:
    if not hasattr(owner, name):
        kind = type(owner)
        raise RuntimeError(
            f"{kind.__module__}.{kind.__name__}: no attribute {name} in the installed version of Lightning; "
            "install a version that pyproject.toml allows"
        )
    return getattr(owner, name)
