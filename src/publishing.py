"""What Weights & Biases is told of a run, beside its metrics: config, pictures, tables, files.

Nothing leaves this module that names a place outside the run directory.
"""

import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.loggers import Logger, WandbLogger

from src.run_directory import RunDirectory

NOT_LOGGED = "(a path: not logged)"
_PATHS = {"output_dir", "cache_dir", "files", "path", "init_from", "local_data"}
"""Keys of a config, in any section, whose values are places on this machine."""
_PATHS_OR_NAMES = {"hub"}
"""Keys whose values are names, or folders."""

_DATA_DIR = "WANDB_DATA_DIR"


def without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config in which paths are replaced by a remark; what they hold is known by fingerprints."""
    return {key: _without_paths(key, value) for key, value in config.items()}


def _without_paths(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return without_paths(value)
    if value is None or value == []:
        return value
    if key in _PATHS or (key in _PATHS_OR_NAMES and _is_place(str(value))):
        return [NOT_LOGGED] * len(value) if isinstance(value, list) else NOT_LOGGED
    if isinstance(value, list):
        return [without_paths(item) if isinstance(item, Mapping) else item for item in value]
    return value


def _is_place(value: str) -> bool:
    return value.startswith((".", "~", os.sep)) or Path(value).exists()


def logged_step(trainer: lightning.Trainer) -> int:
    """The step that Lightning's own log gives a validation now: the index of the last one, not how many there were.

    Resuming keeps what was logged before the steps that it repeats, so all of a validation must lie there.
    """
    return max(0, trainer.global_step - 1)


def log_figures(loggers: Iterable[Logger], figures: Mapping[str, Path], step: int) -> None:
    """Send PNG files; call it on rank 0."""
    for logger in _wandb(loggers):
        for name, path in figures.items():
            logger.log_image(f"figures/{name}", [str(path)], step=step)


def log_table(
    loggers: Iterable[Logger], name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
) -> None:
    """Send a table as it is now; call it on rank 0."""
    for logger in _wandb(loggers):
        with _staged_in_run(logger):
            logger.log_table(f"tables/{name}", columns=list(columns), data=[list(row) for row in rows], step=step)


def publish_results(loggers: Iterable[Logger], run: RunDirectory, *, with_table: bool) -> None:
    """Send the report and, `with_table`, the lookup table as artifacts, read from where they lie; call it on rank 0."""
    for logger in _wandb(loggers):
        with _staged_in_run(logger):
            _publish(logger, [run.report_path], f"report-{run.path.name}", "report")
            if with_table and run.lut_path().is_dir():
                _publish(logger, sorted(run.lut_path().iterdir()), f"lut-{run.path.name}", "lut")


def _publish(logger: WandbLogger, files: Sequence[Path], name: str, kind: str) -> None:
    import wandb

    artifact = wandb.Artifact(name, type=kind)
    for file in files:
        artifact.add_file(str(file), policy="immutable", skip_cache=True)
    logger.experiment.log_artifact(artifact)


@contextmanager
def _staged_in_run(logger: WandbLogger) -> Generator[None]:
    """Let W&B keep what it prepares inside the run, not in the user's home, whose path its record would then hold."""
    before = os.environ.get(_DATA_DIR)
    os.environ[_DATA_DIR] = str(Path(logger.save_dir or ".") / "wandb")
    try:
        yield
    finally:
        if before is None:
            del os.environ[_DATA_DIR]
        else:
            os.environ[_DATA_DIR] = before


def _wandb(loggers: Iterable[Logger]) -> list[WandbLogger]:
    return [logger for logger in loggers if isinstance(logger, WandbLogger)]
