"""Where metrics go: a CSV in the run directory, always, and Weights & Biases.

A resumed run continues both: the CSV from its checkpoint's step on, the W&B run under its recorded id.

What Weights & Biases is told of a run, beside its metrics: config, pictures, tables, files.

Nothing leaves this module that names a place outside the run directory.
"""

import csv
import io
import netrc
import os
import secrets
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import lightning
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from src.run_directory import RunDirectory
from src.system.code_version import code_version
from src.system.files import write_text
from src.system.ranks import is_rank_zero
from src.training.config import WandbConfig

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


_WANDB_ID = "wandb_id"


def build_loggers(
    config: WandbConfig, resolved: Mapping[str, Any], run: RunDirectory, first_step: int = 0
) -> list[Logger]:
    """Return the loggers of a run that begins or goes on at `first_step`; only `online` sends anything anywhere.

    W&B records `resolved`, the run's whole config, without its paths.
    """
    loggers: list[Logger] = [ContinuedCSVLogger(run.path, first_step)]
    mode = wandb_mode(config)
    if mode != "disabled":
        loggers.append(_wandb_logger(config, resolved, run, mode))
    return loggers


def wandb_mode(config: WandbConfig) -> str:
    """Resolve `auto`: online with an API key, offline without one."""
    return config.mode if config.mode != "auto" else ("online" if _has_api_key() else "offline")


def _has_api_key() -> bool:
    """Look where W&B looks, without importing it (seconds) or logging in."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _wandb_logger(config: WandbConfig, resolved: Mapping[str, Any], run: RunDirectory, mode: str) -> WandbLogger:
    import wandb

    logger = WandbLogger(
        id=_wandb_id(run),
        resume="allow",
        name=run.path.name,
        save_dir=run.path,
        project=config.project,
        entity=config.entity,
        tags=list(config.tags),
        offline=mode == "offline",
        config={**without_paths(resolved), "code": code_version(), "fingerprints": _fingerprints(run)},
        # no console output, no host name, no command line, no paths: metrics and config are all that is recorded
        settings=wandb.Settings(
            console="off", silent=True, host="not recorded", x_disable_meta=True, x_disable_stats=True
        ),
    )
    logger._wandb_init.pop("anonymous")  # Lightning passes it always, and W&B warns that it means nothing any more
    return logger


def _fingerprints(run: RunDirectory) -> dict[str, str | None]:
    """Return what identifies the text and the tokenizer of a run."""
    return {"dataset": run.recorded_corpus("fingerprint"), "tokenizer": run.recorded_corpus("tokenizer")}


def _wandb_id(run: RunDirectory) -> str:
    """Return the id that this run has at W&B, a new one when it has none yet."""
    recorded = run.record()
    if _WANDB_ID in recorded:
        return recorded[_WANDB_ID]
    new = secrets.token_hex(4)
    if is_rank_zero():
        run.update_record({_WANDB_ID: new})
    return new


class ContinuedCSVLogger(CSVLogger):
    """`metrics.csv` in a directory, whose rows before `first_step` stay."""

    def __init__(self, directory: Path, first_step: int) -> None:
        """Keep what was logged before `first_step`; what was logged after it will be logged again."""
        super().__init__(save_dir=directory, name="", version="")
        self._first_step = first_step

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer, made when it is first needed."""
        if self._experiment is None:
            self._experiment = _ContinuedWriter(self.log_dir, self._first_step)
        assert isinstance(self._experiment, ExperimentWriter)
        return self._experiment


class _ContinuedWriter(ExperimentWriter):
    """Lightning's writer, which deletes an existing file, on a file that was cut at a step."""

    def __init__(self, log_dir: str, first_step: int) -> None:
        super().__init__(log_dir)
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return
        with path.open(newline="", encoding="utf-8") as handle:
            reader = csv.DictReader(handle)
            kept = [row for row in reader if _is_number(row["step"]) and int(row["step"]) < first_step]
            self.metrics_keys = list(reader.fieldnames or [])
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=self.metrics_keys)
        writer.writeheader()
        writer.writerows(kept)
        write_text(path, text.getvalue())

    def _check_log_dir_exists(self) -> None:
        """Delete nothing."""


def _is_number(text: str | None) -> bool:
    """Whether a row is whole: a kill or a full disk may have cut the last one short."""
    return text is not None and text.isdecimal()


def close_loggers(loggers: Iterable[Logger], *, failed: bool) -> None:
    """Finish the W&B run, so that its record is whole when `train` returns."""
    for logger in loggers:
        if isinstance(logger, WandbLogger) and logger._experiment is not None:
            logger.experiment.finish(exit_code=int(failed))
